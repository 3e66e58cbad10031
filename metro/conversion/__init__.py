"""Conversion between the original's fairseq checkpoints, METRO's own and Hugging Face folders."""
