"""Answers of a model to texts: `metro generate` and `metro.generate`."""
