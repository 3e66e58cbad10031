"""Prompts: templates, mixtures, rendered examples, prepared folders."""
