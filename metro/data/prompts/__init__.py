"""Prompts: templates, mixtures, rendered examples, prepared folders."""

from metro.data.prompts.templates import PromptTemplate as PromptTemplate
