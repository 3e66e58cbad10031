"""PEFT adapters as models: base model and adapter are loaded and merged into plain weights.

A merged model is what every command takes, and what the next adapter may be trained on.

Only tensors are read, and only methods that can be merged into the weights (LoRA and its relatives)
are taken. A setting that would import a module by name is refused.
"""

import importlib.util
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from metro.models.placement import is_dispatched
from metro.models.reading import check_weights, read_tensors
from metro.models.source import ADAPTER_CONFIG
from metro.utils.files import read_json
from metro.utils.messages import MissingPackage, UserError

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = ["*token*", "*.model", "vocab*", "merges.txt", "dict.txt"]


def adapter_folder(source: str) -> Path | None:
    """Find the folder of an adapter, downloaded where ``source`` is a hub id.

    Returns:
        None where ``source`` is a whole model, or nothing.

    Raises:
        OSError: the hub cannot be reached, and has not been before.
    """
    path = Path(source)
    if path.exists():
        return path if (path / ADAPTER_CONFIG).is_file() else None
    if not isinstance(try_to_load_from_cache(source, ADAPTER_CONFIG), str):
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return None
        try:
            hf_hub_download(source, ADAPTER_CONFIG)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
    return Path(
        snapshot_download(source, allow_patterns=[ADAPTER_CONFIG, *WEIGHTS, *TOKENIZER_FILES])
    )


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer was saved with the adapter: it may have tokens of its own."""
    return (folder / "tokenizer_config.json").is_file()


def merge_adapter(base: PreTrainedModel, folder: Path, merge: bool = True) -> PreTrainedModel:
    """Merge the adapter in ``folder`` into the weights of ``base``, which are changed.

    Args:
        base: changed in place.
        folder: of the adapter.
        merge: if not, the adapter stays beside the weights, which are rounded to few bits.

    Raises:
        UserError: the package peft is missing, the adapter is damaged or of another model, or its
            kind cannot be merged.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage(f"the adapter {folder}", "peft", "peft")
    import peft

    if is_dispatched(base):
        raise UserError(
            f"{folder} is an adapter, which cannot be merged into weights on several devices: "
            f"merge it first, metro convert to-hf {folder} --out MODEL"
        )
    settings = read_json(folder / ADAPTER_CONFIG)
    kind, task = settings.get("peft_type"), settings.get("task_type")
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if config_class is None:
        raise UserError(f"{folder} is an adapter of type {kind!r}, which peft does not know")
    if kind == "XLORA" or not hasattr(peft.PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload"):
        raise UserError(
            f"{folder} is an adapter of type {kind}, which cannot be merged into a model's weights;"
            " use one that can, such as LORA"
        )
    if task not in (None, "SEQ_2_SEQ_LM"):
        raise UserError(
            f"{folder} is an adapter for the task {task}; a model that answers texts needs one "
            "trained with task_type SEQ_2_SEQ_LM"
        )
    if settings.get("megatron_config"):
        raise UserError(
            f"{folder} has a megatron_config, which would import a module by name and is not run: "
            f"take it out of {ADAPTER_CONFIG}"
        )
    tensors = read_adapter(folder)
    _resize_embedding(base, tensors)
    owners = Counter(
        id(weight) for module in base.modules() for weight in module._parameters.values()
    )
    config = config_class.from_pretrained(str(folder))
    config.inference_mode = True
    try:
        adapted = peft.PeftModel(base, config)
    except ValueError as error:  # none of its target modules is there
        raise UserError(f"{folder} does not fit {type(base).__name__}: {error}") from None
    _check_fit(adapted, tensors, folder)
    _refuse_shared(adapted, owners, folder)
    peft.set_peft_model_state_dict(adapted, tensors)
    if not merge:
        return adapted.get_base_model()
    return adapted.merge_and_unload().requires_grad_(True)


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter, names as stored.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise UserError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")


def _resize_embedding(base: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give the base the adapter's number of tokens, where it has an embedding of its own."""
    embedding = base.get_input_embeddings().weight
    stored = [
        tensors[f"base_model.model.{name}"]
        for name, weight in base.named_parameters(remove_duplicate=False)
        if weight is embedding and f"base_model.model.{name}" in tensors
    ]
    if stored and len(stored[0]) != len(embedding):
        base.resize_token_embeddings(len(stored[0]), mean_resizing=False)


def _check_fit(adapted, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Check that the stored tensors are all that the adapter has, and whole ones of the base."""
    import peft

    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected |= {name: t for name, t in adapted.state_dict().items() if name in tensors}
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    check_weights(
        tensors, shapes, str(folder), f"an adapter of {type(adapted.get_base_model()).__name__}"
    )


def _refuse_shared(adapted, owners: Counter, folder: Path) -> None:
    """Refuse an adapter on a weight that several modules share: merging would change them all."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        else:
            continue
        if any(
            owners[id(weight)] > 1 for weight in module._parameters.values() if weight is not None
        ):
            raise UserError(
                f"{folder} adapts {name.removeprefix('base_model.model.')}, whose weights are also "
                "those of another part of the model, so that it cannot be merged: train the "
                "adapter without that module"
            )


def register_default_targets(model_type: str) -> None:
    """Let PEFT's configurations leave ``target_modules`` out, as for T5."""
    try:
        from peft.utils import constants
    except ImportError:
        return
    for name, table in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and "t5" in table:
            table.setdefault(model_type, table["t5"])
