"""Write a METRO-T5 as a Hugging Face folder that loads with transformers alone.

An export has these files:

==========================================  ======================================================
``config.json``                             sizes, dropout, ``auto_map``
``generation_config.json``                  start and end tokens of generation
``model.safetensors``                       weights; the embedding matrix once: ``shared.weight``
``sp.model``, ``dict.txt``,                 vocabulary and tokenizer settings
``tokenizer_config.json``
``README.md``                               model card
``configuration_metro_t5.py``, ...          ``EXPORTED_CODE``: copies of ``metro/modeling``, which
                                            transformers runs with ``trust_remote_code=True``
``training.json``                           training settings, if made from a fairseq checkpoint
``pretraining.safetensors``                 auxiliary model and RTD head, with ``--keep-auxiliary``
``checksums.json``                          sizes and checksums of the files above
==========================================  ======================================================

``metro.load`` reads the folder with METRO's own classes and runs none of its Python files.
"""

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

import metro.modeling
from metro.conversion.model_card import model_card
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.modeling.text_metro_t5 import NUM_SPECIAL_IDS
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from metro.models.adapters import adapter_folder
from metro.models.fairseq_checkpoint import PRETRAINING_WEIGHTS, TRAINING, untied
from metro.models.loading import load
from metro.models.source import model_source
from metro.sharding import whole
from metro.utils.checksums import record
from metro.utils.files import check_output, new_folder, read_json, write_json, write_text
from metro.utils.messages import UserError

EXPORTED_CODE = (
    "configuration_metro_t5.py",
    "attention_metro_t5.py",
    "layers_metro_t5.py",
    "modeling_metro_t5.py",
    "classification_metro_t5.py",
    "text_metro_t5.py",
    "tokenization_metro_t5.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_metro_t5.MetroT5Config",
    "AutoModel": "modeling_metro_t5.MetroT5EncoderModel",
    "AutoModelForSeq2SeqLM": "modeling_metro_t5.MetroT5ForConditionalGeneration",
    "AutoModelForSequenceClassification": (
        "classification_metro_t5.MetroT5ForSequenceClassification"
    ),
    "AutoModelForTextEncoding": "modeling_metro_t5.MetroT5EncoderModel",
}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": ["tokenization_metro_t5.MetroT5Tokenizer", None]}
WEIGHTS = "model.safetensors"
MACHINE_FIELDS = ("is_local", "local_files_only", "name_or_path")


def write_model(
    model: PreTrainedModel,
    tokenizer,
    out: Path,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
    **card: Any,
) -> None:
    """Write any model as a Hugging Face folder; ``state``, ``card``: see :func:`export_model`."""
    if isinstance(model, MetroT5ForConditionalGeneration):
        export_model(model, tokenizer, out, state=state, overwrite=overwrite, **card)
        return
    with new_folder(out, overwrite) as folder:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        record(folder, (path.name for path in folder.iterdir()))


def merge_to_hf(
    adapter: str | Path,
    out: Path,
    *,
    vocab: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> PreTrainedModel:
    """Write an adapter and its base model as one Hugging Face folder.

    Args:
        adapter: its folder or hub id.
        out: the folder to create.
        vocab: of the base model, where it is a fairseq checkpoint.
        dtype: of the weights; by default as the base model's configuration says.
        overwrite: replace an existing ``out``.

    Returns:
        The merged model.

    Raises:
        UserError: ``out`` exists, ``adapter`` is not one, or its base model is not available.
    """
    check_output(out, overwrite, (Path(adapter),))
    model, tokenizer = load(adapter, dtype=dtype, vocab=vocab)
    if adapter_folder(model_source(adapter)) is None:
        raise UserError(
            f"{adapter} is a whole model in Hugging Face's form already: use it as it is"
        )
    summary = f"{type(model).__name__} with the adapter {Path(adapter).name} merged into it."
    write_model(model, tokenizer, out, overwrite=overwrite, summary=summary)
    return model


def export_model(
    model: MetroT5ForConditionalGeneration,
    tokenizer: MetroT5Tokenizer,
    out: str | Path,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    summary: str = "",
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in memory as a Hugging Face folder.

    Of a model that is sharded over processes (FSDP), all of them call this and the first writes.

    Args:
        model: a METRO-T5; its weights are written with the types they have.
        tokenizer: of the model.
        out: the folder to create.
        state: all its weights; by default they are asked of the model.
        summary: a sentence or two on the model, for its card.
        training: rows of the card's table on training, by label.
        overwrite: replace an existing folder.

    Raises:
        UserError: ``out`` exists, or ``model`` is not a METRO-T5.
    """
    if not isinstance(model, MetroT5ForConditionalGeneration):
        raise UserError(
            f"{type(model).__name__} is not METRO-T5: save it with its own save_pretrained"
        )
    out = Path(out)
    check_output(out, overwrite)
    if (state := state or whole_state(model)) is not None:
        weights = {name: tensor.detach().cpu() for name, tensor in untied(state).items()}
        card = model_card(out.name, summary, model.config, weights, training or {})
        write_folder(
            out, model.config, model.generation_config, weights, tokenizer, card, overwrite
        )


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the state dict of a model, gathered on the CPU where it is sharded.

    Of a model that is sharded over processes (FSDP), all of them call this, and all but the first
    get None. Weights under several names are one tensor.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return state
    is_first = torch.distributed.get_rank() == 0
    owners = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    gathered: dict[Any, torch.Tensor] = {}
    for name, tensor in state.items():
        if (key := owners.get(name, name)) not in gathered:
            full = whole(tensor)
            gathered[key] = full.detach().cpu() if is_first else full.new_empty(0)
        state[name] = gathered[key]
    return state if is_first else None


def write_folder(
    out: Path,
    config: MetroT5Config,
    generation: GenerationConfig,
    weights: Mapping[str, torch.Tensor],
    tokenizer: MetroT5Tokenizer,
    card: str,
    overwrite: bool = False,
    *,
    pretraining_weights: Mapping[str, torch.Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    inputs: tuple[Path, ...] = (),
) -> None:
    """Write all files of an export; the folder appears when it is complete.

    Args:
        out: the folder to create.
        config: of the model.
        generation: start and end tokens.
        weights: of the model, the embedding matrix once, as ``shared.weight``.
        tokenizer: of the model.
        card: content of ``README.md``.
        overwrite: replace an existing folder.
        pretraining_weights: auxiliary model and RTD head, if they are kept.
        training: content of ``training.json``, for conversion back to fairseq.
        inputs: files and folders that are read, which a replaced folder must not contain.

    Raises:
        UserError: ``out`` exists and must not be replaced.
    """
    with new_folder(out, overwrite, inputs) as folder:
        source = Path(metro.modeling.__file__).parent
        for name in EXPORTED_CODE:
            shutil.copyfile(source / name, folder / name)
        _save(weights, folder / WEIGHTS)
        if pretraining_weights:
            _save(pretraining_weights, folder / PRETRAINING_WEIGHTS)
        if training is not None:
            write_json(folder / TRAINING, training, indent=2, seal=True)
        _save_tokenizer(tokenizer, folder, config.max_positions)
        generation.save_pretrained(folder)
        write_text(folder / "README.md", card)
        fields = config_fields(config, weights["shared.weight"].dtype)
        write_json(folder / "config.json", fields, indent=2)
        record(folder, {path.name for path in folder.iterdir()} - {"README.md"})


def config_fields(config: MetroT5Config, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of ``config.json``, with every size and constant, defaults included."""
    fields = config.to_diff_dict()
    for name in inspect.signature(MetroT5Config.__init__).parameters:
        if name not in ("self", "kwargs"):
            fields[name] = getattr(config, name)
    fields |= {
        "architectures": ["MetroT5ForConditionalGeneration"],
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": MetroT5Config.model_type,
        "transformers_version": transformers.__version__,
    }
    for name in ("torch_dtype", "_name_or_path"):
        fields.pop(name, None)
    return dict(sorted(fields.items()))


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def _save_tokenizer(tokenizer: MetroT5Tokenizer, folder: Path, max_positions: int) -> None:
    """Save the tokenizer with an ``auto_map`` and without fields specific to this machine."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = {name: value for name, value in read_json(path).items() if name not in MACHINE_FIELDS}
    added = fields.pop("added_tokens_decoder", {})  # the four that all have are known
    if added := {key: token for key, token in added.items() if int(key) >= NUM_SPECIAL_IDS}:
        fields["added_tokens_decoder"] = added
    fields["model_max_length"] = min(fields.get("model_max_length", max_positions), max_positions)
    fields |= {"auto_map": TOKENIZER_AUTO_MAP, "tokenizer_class": "MetroT5Tokenizer"}
    write_json(path, fields, indent=2)
