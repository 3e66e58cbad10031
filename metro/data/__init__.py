"""Data for pretraining and prompt-finetuning."""
