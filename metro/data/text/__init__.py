"""Pretraining text: reading, vocabulary, encoding, the binarised corpus."""
