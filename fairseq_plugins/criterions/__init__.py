"""Criteria `t5_metro` and `flipped`."""

from fairseq_plugins.criterions import flipped, t5_metro  # noqa: F401
