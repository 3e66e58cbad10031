"""Prompt finetuning: the objectives direct, channel and flipped, their data and the Trainer."""
