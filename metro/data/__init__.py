"""Data for pretraining and prompt-finetuning."""

# Here so that `metro prepare-text --help` shows it without importing NumPy.
DEFAULT_VALID_FRACTION = 0.005
"""Share of the documents that ``prepare_text`` sets aside for validation."""
