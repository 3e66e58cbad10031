"""Evaluation tasks: suites, their rows and examples, protocols."""
