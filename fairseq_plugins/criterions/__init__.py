"""Criterion `t5_metro`."""

from fairseq_plugins.criterions import t5_metro  # noqa: F401
