"""Pretraining tasks `t5_metro` and `t5`, and `t5_prompt_finetuning`."""

from fairseq_plugins.tasks import t5, t5_metro, t5_prompt_finetuning  # noqa: F401
