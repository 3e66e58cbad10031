"""Models: `t5_metro*` (METRO pretraining) and `transformer_t5*` (plain T5)."""

from fairseq_plugins.models import metro_t5, transformer_t5  # noqa: F401
