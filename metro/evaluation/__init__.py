"""Zero-shot evaluation: rank classification of prompted examples, suites of tasks, reports."""
