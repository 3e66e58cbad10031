"""Settings of `metro finetune` and `metro.finetune`. Nothing heavy is imported here."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from metro.data.prompts.encoding import TRUNCATION_SIDES
from metro.data.settings import TEMPLATE_HELP, OwnRowsSettings
from metro.models.placement import BITS
from metro.sharding import ShardingSettings
from metro.utils.messages import UserError
from metro.utils.settings import PRECISIONS, option

OBJECTIVES = ("direct", "channel", "flipped", "direct+ul")
NEED_CHOICES = ("flipped", "direct+ul")
OWN_ROWS = "own_rows"
"""The configuration that own rows take where nothing else is said."""


@dataclass(kw_only=True)
class FinetuningSettings(OwnRowsSettings, ShardingSettings):
    """Options of a finetuning run.

    From options (`of`, `combine`) those of own rows begin from the configuration ``own_rows``.
    """

    CONFIGS = Path(__file__).parent / "configs"

    model: str = option(help="Name, hub id, folder or fairseq .pt.")
    data: str = option(help="Own rows, prepared prompts, or a mixture.")
    template: list[str] | None = option(None, TEMPLATE_HELP)
    output_dir: str = option(help="Folder of model, checkpoints and logs.")
    objective: str = option("direct", "Training objective.", choices=OBJECTIVES)

    vocab: str | None = option(
        None, "Folder with sp.model and dict.txt, for a fairseq .pt.", section="Model and data"
    )
    templates: str | None = option(None, "Template tree, where --data is a mixture.")
    data_dir: str | None = option(None, "Local datasets, where --data is a mixture.")
    dataset: list[str] | None = option(None, "Of a mixture, these datasets only.")

    max_input_length: int = option(
        512, "Encoder tokens; longer inputs are cut.", least=3, section="Examples, loss"
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
    max_steps: int | None = option(
        -1, "Updates; -1: as num_train_epochs says; of own rows by default from their number."
    )
    num_train_epochs: float = option(1.0, "Passes over the mixture.", least=0)
    learning_rate: float | None = option(
        1e-3, "Peak learning rate; of own rows by default from the model's width."
    )
    lr_scheduler: str = option("constant", "constant, linear, cosine, ... with warmup_steps.")
    warmup_steps: int = option(0, "Updates of linear warm-up.", least=0)
    optimizer: str = option(
        "adafactor", "adafactor (fixed rate), adamw, or another of the Trainer."
    )
    adam_betas: list[float] = option([0.9, 0.999], "Of adamw.", least=0, below=1)
    adam_epsilon: float = option(1e-8, "Of adamw.", least=0)
    weight_decay: float = option(0.0, "Weight decay.", least=0)
    max_grad_norm: float = option(1.0, "Gradient norm clipping; 0: none.", least=0)
    dropout: float | None = option(None, "Dropout; default: the model's own.", least=0, below=1)

    precision: str = option(
        "auto",
        "auto: bf16 on GPUs that have it and, for wide models, on such CPUs; else fp32.",
        choices=PRECISIONS,
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
    early_stopping: int | None = option(
        None, "Stop after so many evaluations without a better one, and keep the best.", least=1
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

    lora: bool = option(
        False, "Train adapters of all linear layers, not the weights.", section="LoRA"
    )
    lora_r: int = option(16, "Rank of the adapters.", least=1)
    lora_alpha: int = option(32, "Their scale is this over the rank.", least=1)
    lora_dropout: float = option(0.05, "Of their input.", least=0, below=1)
    load_in: str | None = option(
        None, "QLoRA: the weights beside the adapters in so many bits.", choices=BITS
    )

    valid_fraction: float | None = option(
        None,
        "Share for validation; default: a split of that name, else a fifth of 100 or more rows.",
        least=0,
        below=1,
        section="Own rows",
    )

    def check(self) -> None:
        """Refuse values that do not fit together."""
        self.check_own_rows(self.data)
        self.check_sharding()
        if self.valid_fraction is not None and not self.asks_own_rows:
            raise UserError("valid_fraction is for rows of your own: add template or input_field")
        if self.early_stopping and not self.eval_steps:
            raise UserError("early_stopping needs evaluations: give eval_steps")
        if self.load_in and not self.lora:
            raise UserError(f"weights in {self.load_in} cannot be trained: add lora")
        if self.load_in and (self.fsdp or self.deepspeed):
            engine = "fsdp" if self.fsdp else "deepspeed"
            raise UserError(
                f"weights in {self.load_in} are not sharded: leave load_in or {engine} out"
            )
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name.startswith("lora_") and not self.lora and value != part.default:
                raise UserError(f"{part.name} is {value}, but nothing trains adapters: add lora")
        if len(self.adam_betas) != 2:
            raise UserError(f"adam_betas is {self.adam_betas}; give two, such as 0.9 and 0.98")
        for name in ("save_steps", "eval_steps"):
            steps = getattr(self, name)
            if steps is not None and steps > 1 and steps != int(steps):
                raise UserError(f"{name} is {steps}; use a whole number, or less than 1 as a share")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}; use more than 0")
        if self.max_steps is not None and (self.max_steps == 0 or self.max_steps < -1):
            raise UserError(f"max_steps is {self.max_steps}; use 1 or more, or -1")
        if self.max_steps == -1 and not self.num_train_epochs:
            raise UserError("num_train_epochs is 0.0; use more than 0, or give max_steps")
        if self.label_smoothing and self.objective not in ("direct", "channel"):
            raise UserError(
                f"label_smoothing is {self.label_smoothing}, which {self.objective} does not have; "
                "set it to 0"
            )

    @classmethod
    def _made(cls, options: dict[str, Any]) -> Self:
        if options.get("template") or options.get("input_field"):
            options = cls.read(OWN_ROWS) | options
        return super()._made(options)


def check_sources(settings: FinetuningSettings) -> None:
    """Refuse what does not exist or fit, seconds before torch is imported.

    Raises:
        UserError: model, vocabulary or data do not exist, or are something else; or own rows do not
            have what the templates read.
    """
    from metro.data.local_files import splits_in
    from metro.data.own_prompts import own_questions, training_split
    from metro.data.own_rows import OwnData
    from metro.data.prepared_folder import PROMPTS_MANIFEST
    from metro.data.prompts.mixtures import find_mixture
    from metro.data.prompts.stored import read_manifest
    from metro.data.text.vocabulary import read_vocabulary
    from metro.models.source import model_source

    model_source(settings.model)
    if settings.vocab:
        read_vocabulary(settings.vocab)
    data = Path(settings.data)
    if settings.asks_own_rows:
        own = OwnData(settings.data, settings.subset, settings.split_field)
        own_questions(settings, own.rows(training_split(own)), own.data)
    elif data.is_dir() and ((data / PROMPTS_MANIFEST).is_file() or not splits_in(data)):
        read_manifest(data)
    elif data.exists() and data.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"{data} holds rows: say how to ask, with --template 'What is this? {{{{text}}}} ||| "
            "{{label}}' or with --input-field and --target-field"
        )
    else:
        find_mixture(settings.data)
