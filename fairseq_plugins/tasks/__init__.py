"""Pretraining tasks: `t5_metro` and `t5`."""

from fairseq_plugins.tasks import t5, t5_metro  # noqa: F401
