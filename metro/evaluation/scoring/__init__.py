"""Scoring of answer choices and metrics."""
