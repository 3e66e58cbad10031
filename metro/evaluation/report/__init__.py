"""The comparison report: tables, page, figures."""
