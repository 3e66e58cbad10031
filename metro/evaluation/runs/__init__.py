"""Evaluation runs: the loop over prompts, run folders, summaries, published numbers."""
