"""Settings of `metro plan` and `metro.plan`. Nothing heavy is imported here."""

from dataclasses import dataclass

from metro.utils.messages import UserError
from metro.utils.settings import Settings, option


@dataclass(kw_only=True)
class PlanSettings(Settings):
    """Options of a plan: a model to use and finetune, or a configuration of pretraining."""

    model: str | None = option(None, "Name, hub id or folder; no weights are read.")
    pretrain: str | None = option(None, "Instead: a configuration of metro pretrain.")
    finetune: str | None = option(None, "A configuration of metro finetune, with its model.")
    gpus: int = option(1, "GPUs of all machines.", least=1)
    memory: float = option(80, "GB of each (10^9 bytes).", least=1)

    objective: str | None = option(
        None,
        "Default: that of the configuration or model.",
        choices=("direct", "channel", "flipped", "direct+ul"),
        section="Finetuning",
    )
    batch_size: int | None = option(None, "Examples per GPU and micro-batch.", least=1)
    max_input_length: int | None = option(None, "Encoder tokens.", least=3)
    max_target_length: int | None = option(None, "Decoder tokens.", least=3)
    optimizer: str | None = option(None, "adafactor or adamw.")
    vocabulary: int = option(
        32768, "Entries without sentinels, of pretraining; of base++ and large++ 64000.", least=1
    )
    precision: str | None = option(
        None,
        "Of training; default: that of the configuration (its auto is bf16).",
        choices=("bf16", "fp32"),
    )

    def check(self) -> None:
        """Refuse no model, and two."""
        if (self.model is None and self.finetune is None) == (self.pretrain is None):
            raise UserError("give model (or finetune), or pretrain: one of the two")
