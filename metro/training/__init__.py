"""Runs of training: the Trainer, its output folder, and pretraining from settings to a model."""
