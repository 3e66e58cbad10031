"""Settings of `metro finetune` and `metro.finetune`. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from metro.data.prompts.encoding import TRUNCATION_SIDES
from metro.utils.messages import UserError
from metro.utils.settings import Settings, option

OBJECTIVES = ("direct", "channel", "flipped", "direct+ul")


@dataclass(kw_only=True)
class FinetuningSettings(Settings):
    """Options of a finetuning run."""

    CONFIGS = Path(__file__).parent / "configs"

    model: str = option(help="Registered name, hub id, Hugging Face folder or fairseq .pt.")
    data: str = option(
        help="Folder of metro prepare-prompts (jsonl), or a mixture's name: prepared first."
    )
    output_dir: str = option(help="Where checkpoints, logs and the finished model go.")
    objective: str = option("direct", "Training objective.", choices=OBJECTIVES)

    vocab: str | None = option(
        None, "Folder with sp.model and dict.txt, for a fairseq .pt.", section="Model and data"
    )
    templates: str | None = option(None, "Template tree, where --data is a mixture.")
    data_dir: str | None = option(None, "Local datasets, where --data is a mixture.")
    dataset: list[str] | None = option(None, "Of a mixture, these datasets only.")

    max_input_length: int = option(
        512, "Encoder tokens; longer inputs are cut.", least=3, section="Examples and loss"
    )
    max_target_length: int = option(256, "Decoder tokens; longer targets are cut.", least=3)
    truncation_side: str = option(
        "right", "right: longer inputs lose their end; left: beginning.", choices=TRUNCATION_SIDES
    )
    sampling: str | None = option(
        None,
        "How tasks are weighted; default: proportional for the mixture flipped.",
        choices=("capped", "proportional"),
    )
    limit: int | None = option(None, "At most so many training examples per task.", least=1)
    unlikelihood_weight: float = option(
        3.0, "Lambda of flipped and direct+ul; 0: without.", least=0
    )
    mean: str = option("tokens", "Loss: mean over these.", choices=("tokens", "examples"))
    label_smoothing: float = option(0.0, "Of direct and channel.", least=0, most=1)

    batch_size: int = option(
        8, "Examples per process and micro-batch.", least=1, section="Optimisation"
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches per update.", least=1)
    batching: str = option(
        "length", "length: examples of similar length together.", choices=("length", "random")
    )
    max_steps: int = option(-1, "Updates; -1: as num_train_epochs says.")
    num_train_epochs: float = option(1.0, "Passes over the mixture.", least=0)
    learning_rate: float = option(1e-3, "Peak learning rate.")
    lr_scheduler: str = option("constant", "constant, linear, cosine, ... with warmup_steps.")
    warmup_steps: int = option(0, "Updates of linear warm-up.", least=0)
    optimizer: str = option(
        "adafactor", "adafactor (fixed rate), adamw, or another of the Trainer."
    )
    adam_betas: list[float] = option([0.9, 0.999], "Of adamw.", least=0)
    adam_epsilon: float = option(1e-8, "Of adamw.", least=0)
    weight_decay: float = option(0.0, "Weight decay.", least=0)
    max_grad_norm: float = option(1.0, "Gradient norm clipping; 0: none.", least=0)
    dropout: float | None = option(None, "Dropout; default: the model's own.", least=0)

    precision: str = option(
        "auto",
        "auto: bf16 where the GPU has it, fp32 on the CPU.",
        choices=("auto", "bf16", "fp16", "fp32"),
        section="Device",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations: less memory, slower.")
    attn_implementation: str | None = option(
        None, "Default: the model's choice.", choices=("eager", "sdpa")
    )
    num_workers: int = option(0, "Processes that encode examples.", least=0)
    use_cpu: bool = option(False, "Train on the CPU although there is a GPU.")

    logging_steps: int = option(10, "Log every so many updates.", least=1, section="Run")
    save_steps: float = option(500, "Save every so many updates; below 1: share of all.", least=0)
    save_total_limit: int | None = option(2, "Checkpoints kept; 0: all.", least=0)
    eval_steps: float | None = option(
        None, "Evaluate every so many updates; default: never.", least=0
    )
    eval_limit: int = option(100, "Validation examples per task.", least=1)
    eval_batch_size: int = option(32, "Validation examples per process and batch.", least=1)
    resume: str = option("auto", "auto: from the last checkpoint of output_dir; never; or a path.")
    report_to: str = option(
        "auto", "auto (TensorBoard where it is installed), tensorboard, wandb, none, ..."
    )
    seed: int = option(
        42, "Of order, templates, wrong labels and dropout.", least=0, most=2**32 - 1
    )

    def check(self) -> None:
        """Refuse values that do not fit together."""
        if self.dropout is not None and self.dropout >= 1:
            raise UserError(f"dropout is {self.dropout}; use 0 up to less than 1")
        if len(self.adam_betas) != 2:
            raise UserError(f"adam_betas is {self.adam_betas}; give two, such as 0.9 and 0.98")
        if max(self.adam_betas) >= 1:
            raise UserError(f"adam_betas is {self.adam_betas}; use 0 up to less than 1")
        for name in ("save_steps", "eval_steps"):
            steps = getattr(self, name)
            if steps is not None and steps > 1 and steps != int(steps):
                raise UserError(f"{name} is {steps}; use a whole number, or less than 1 as a share")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}; use more than 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps is {self.max_steps}; use 1 or more, or -1")
        if self.label_smoothing and self.objective not in ("direct", "channel"):
            raise UserError(
                f"label_smoothing is {self.label_smoothing}, which {self.objective} does not have; "
                "set it to 0"
            )


def check_sources(settings: FinetuningSettings) -> None:
    """Refuse a model, vocabulary or data that do not exist, seconds before torch is imported.

    Raises:
        UserError: one of them does not exist, or is something else.
    """
    from metro.data.prompts.mixtures import find_mixture
    from metro.data.prompts.stored import read_manifest
    from metro.data.text.vocabulary import read_vocabulary
    from metro.models.source import model_source

    model_source(settings.model)
    if settings.vocab:
        read_vocabulary(settings.vocab)
    if Path(settings.data).is_dir():
        read_manifest(settings.data)
    else:
        find_mixture(settings.data)
