"""Every option of `metro finetune`, once: the command line, YAML files and Python use these.

Light on purpose: nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from metro.utils.messages import UserError, did_you_mean


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class FinetuningSettings:
    """Options of a finetuning run."""

    model: str = option(MISSING, "Registered name, hub id, Hugging Face folder or fairseq .pt.")
    data: str = option(
        MISSING, "Folder of metro prepare-prompts (jsonl), or a mixture's name: prepared first."
    )
    output_dir: str = option(MISSING, "Where checkpoints, logs and the finished model go.")
    objective: str = option("direct", "direct, channel, flipped or direct+ul.")

    vocab: str | None = option(None, "Folder with sp.model and dict.txt, for a fairseq .pt.")
    templates: str | None = option(None, "Template tree, where --data is a mixture.")
    data_dir: str | None = option(None, "Local datasets, where --data is a mixture.")
    dataset: list[str] | None = option(None, "Of a mixture, these datasets only.")

    max_input_length: int = option(512, "Encoder tokens; longer inputs are cut.")
    max_target_length: int = option(256, "Decoder tokens; longer targets are cut.")
    sampling: str | None = option(
        None, "capped or proportional; default: proportional for the mixture flipped."
    )
    limit: int | None = option(None, "At most so many training examples per task.")
    unlikelihood_weight: float = option(3.0, "Lambda of flipped and direct+ul; 0: without.")
    mean: str = option("tokens", "Loss: mean over tokens, or over examples.")
    label_smoothing: float = option(0.0, "Of direct and channel.")

    batch_size: int = option(8, "Examples per process and micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per update.")
    batching: str = option("length", "length (examples of similar length together) or random.")
    max_steps: int = option(-1, "Updates; -1: as num_train_epochs says.")
    num_train_epochs: float = option(1.0, "Passes over the mixture.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    lr_scheduler: str = option("constant", "constant, linear, cosine, ... with warmup_steps.")
    warmup_steps: int = option(0, "Updates of linear warm-up.")
    optimizer: str = option(
        "adafactor", "adafactor (fixed rate), adamw, or another of the Trainer."
    )
    adam_betas: list[float] = field(
        default_factory=lambda: [0.9, 0.999], metadata={"help": "Of adamw."}
    )
    adam_epsilon: float = option(1e-8, "Of adamw.")
    weight_decay: float = option(0.0, "Weight decay.")
    max_grad_norm: float = option(1.0, "Gradient norm clipping; 0: none.")
    dropout: float | None = option(None, "Dropout; default: the model's own.")

    precision: str = option("auto", "auto (bf16 where the GPU has it), bf16, fp16 or fp32.")
    gradient_checkpointing: bool = option(False, "Recompute activations: less memory, slower.")
    attn_implementation: str | None = option(None, "eager or sdpa; default: the model's choice.")
    num_workers: int = option(0, "Processes that encode examples.")
    use_cpu: bool = option(False, "Train on the CPU although there is a GPU.")

    logging_steps: int = option(10, "Log every so many updates.")
    save_steps: float = option(500, "Save every so many updates; below 1: share of all.")
    save_total_limit: int | None = option(2, "Checkpoints kept.")
    eval_steps: float | None = option(None, "Evaluate every so many updates; default: never.")
    eval_limit: int = option(100, "Validation examples per task.")
    eval_batch_size: int = option(32, "Validation examples per process and batch.")
    resume: str = option("auto", "auto: from the last checkpoint of output_dir; never; or a path.")
    report_to: str = option(
        "auto", "auto (TensorBoard where it is installed), tensorboard, wandb, none, ..."
    )
    seed: int = option(42, "Of order, templates, wrong labels and dropout.")

    def __post_init__(self):
        for part in fields(self):
            value = getattr(self, part.name)
            setattr(self, part.name, _typed(part.name, value, part.type))
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                words = ", ".join(word for word in valid if word is not None)
                raise UserError(f"{name} is {getattr(self, name)!r}; use one of {words}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise UserError(f"{name} is {value}; use {least} or more")
        if self.dropout is not None and self.dropout >= 1:
            raise UserError(f"dropout is {self.dropout}; use 0 up to less than 1")
        if len(self.adam_betas) != 2:
            raise UserError(f"adam_betas is {self.adam_betas}; give two, such as 0.9 and 0.98")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}; use more than 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps is {self.max_steps}; use 1 or more, or -1")
        if self.label_smoothing and self.objective not in ("direct", "channel"):
            raise UserError(
                f"label_smoothing is {self.label_smoothing}, which {self.objective} does not have; "
                "set it to 0"
            )

    def as_dict(self) -> dict:
        return asdict(self)


CHOICES = {
    "objective": ("direct", "channel", "flipped", "direct+ul"),
    "sampling": (None, "capped", "proportional"),
    "mean": ("tokens", "examples"),
    "batching": ("length", "random"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "attn_implementation": (None, "eager", "sdpa"),
}
LEAST = {
    "max_input_length": 3,
    "max_target_length": 3,
    "limit": 1,
    "unlikelihood_weight": 0,
    "label_smoothing": 0,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "dropout": 0,
    "num_workers": 0,
    "logging_steps": 1,
    "save_steps": 0,
    "eval_limit": 1,
    "eval_batch_size": 1,
}


def _typed(name: str, value, annotation: str):
    """YAML reads 5e-5 as text, and a number for a name as a number."""
    if value is None:
        if "None" in annotation:
            return None
        raise UserError(f"{name} is empty; give a value or leave it out")
    kind = annotation.removesuffix(" | None")
    try:
        if kind == "float":
            return float(value)
        if kind == "int" and float(value) == int(float(value)):
            return int(float(value))
        if kind == "bool" and isinstance(value, bool):
            return value
        if kind == "str" and not isinstance(value, list | dict):
            return str(value)
        if kind.startswith("list"):
            values = [value] if isinstance(value, str) else list(value)
            return [float(part) for part in values] if "float" in kind else [*map(str, values)]
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{name} is {value!r}; it has to be of the kind {kind}")


REQUIRED = ("model", "data", "output_dir")
NAMES = tuple(part.name for part in fields(FinetuningSettings))


def read_settings(path: str | Path) -> dict:
    """A YAML file of options.

    Raises:
        ValueError: it is no mapping, or a key is no option.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options; write lines such as `objective: flipped`")
    for key in content:
        if key not in NAMES:
            hint = did_you_mean(str(key), NAMES)
            raise UserError(f"{path} has an unknown option {key!r}; {hint}")
    return content


SHIPPED = Path(__file__).parent / "configs"


def find_config(config: str | Path) -> Path:
    """A file, or a configuration that comes with METRO, by its name."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if Path(config).is_file():
        return Path(config)
    if str(config) not in shipped:
        raise UserError(
            f"there is no file {config}, nor a configuration of that name; METRO has "
            f"{', '.join(shipped)}"
        )
    return shipped[str(config)]


def combine(config: str | Path | None, given: dict) -> FinetuningSettings:
    """Options from a file, overridden by those `given` (None = not given)."""
    options = read_settings(find_config(config)) if config else {}
    options |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in REQUIRED if options.get(name) is None]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(f"missing: {flags}; give them as options or in the file of --config")
    return FinetuningSettings(**options)


def check_sources(settings: FinetuningSettings) -> None:
    """Refuse a model, vocabulary or data that are not there, seconds before torch is imported.

    Raises:
        ValueError: one of them is not there, or is something else.
    """
    from metro.data.prompts.mixtures import find_mixture
    from metro.data.prompts.stored import read_manifest
    from metro.modeling.text_metro_t5 import Vocabulary
    from metro.models.source import model_source

    model_source(settings.model)
    if settings.vocab:
        Vocabulary.from_folder(settings.vocab)
    if Path(settings.data).is_dir():
        read_manifest(settings.data)
    else:
        find_mixture(settings.data)
