"""``metro.load``: a model and its tokenizer from a name, a folder, or a fairseq checkpoint."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.models.auto_classes import register
from metro.models.fairseq_checkpoint import generation_config, read_checkpoint, untied
from metro.models.folder_weights import read_folder
from metro.models.source import model_source
from metro.models.vocabulary_folder import build_tokenizer, find_vocabulary
from metro.models.weights_check import complain
from metro.utils.messages import UserError

PADDED_ROWS = 128
"""An embedding may have up to this many rows more than the tokenizer has entries."""


class LoadedModel(NamedTuple):
    """What :func:`load` returns."""

    model: PreTrainedModel
    """In evaluation mode."""
    tokenizer: object
    """The tokenizer that the model was trained with."""


def load(
    path_or_name: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    vocab: str | os.PathLike | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer. No code that comes with a model is ever run.

    Args:
        path_or_name: a registered name (``metro models`` lists them), an id on the Hugging Face
            hub, a Hugging Face folder of any sequence-to-sequence model (METRO's own exports and
            the released METRO-T0 folders included), or a checkpoint ``.pt`` of fairseq.
        dtype: of the weights in memory; by default as the model's configuration says.
        device: where to put the model; by default the CPU.
        attn_implementation: ``"eager"`` or ``"sdpa"``.
        vocab: folder with ``sp.model`` and ``dict.txt``, for checkpoints of fairseq; by default the
            folder that the checkpoint was trained on.

    Raises:
        ValueError: no such model, or files that are damaged or do not belong together.
    """
    register()
    dtype = resolve_dtype(dtype)
    path = Path(path_or_name)
    if path.is_file():
        with _quiet():
            loaded = _from_checkpoint(path, dtype, attn_implementation, vocab)
    else:
        if vocab is not None:
            raise UserError(
                f"vocab is {os.fspath(vocab)!r}, but {path_or_name} is no checkpoint of fairseq: "
                "other models bring their own vocabulary; leave vocab out"
            )
        with _quiet():
            loaded = _from_pretrained(model_source(path_or_name), dtype, attn_implementation)
    model = loaded.model.eval()
    if device is not None:
        model = model.to(device)
    return LoadedModel(model, loaded.tokenizer)


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """``"bfloat16"``, ``"bf16"`` and the like as torch's types; ``None`` and ``"auto"`` as None.

    Raises:
        ValueError: not a floating point type.
    """
    if dtype is None or dtype == "auto":
        return None
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype is {dtype!r}; use float32, bfloat16 or float16")
    return found


@contextlib.contextmanager
def _quiet():
    """Without transformers' bars and tables: complaints come from here, all at once."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _from_checkpoint(path: Path, dtype, attn_implementation, vocab) -> LoadedModel:
    checkpoint = read_checkpoint(path)
    folder = vocab or find_vocabulary(checkpoint.task, path)
    count = checkpoint.task.get("tokens_per_sample")
    tokenizer = build_tokenizer(folder, checkpoint.config.vocab_size, count)
    # Copied, as the checkpoint's tensors are views of the file, which may be written anew.
    state = {name: tensor.clone() for name, tensor in untied(checkpoint.main).items()}
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = MetroT5ForConditionalGeneration.from_pretrained(
        None,
        config=checkpoint.config,
        state_dict=state,
        dtype=state["shared.weight"].dtype if dtype is None else dtype,
        **options,
    )
    model.generation_config = generation_config(checkpoint)
    return LoadedModel(model, tokenizer)


def _from_pretrained(source: str, dtype, attn_implementation) -> LoadedModel:
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    never = {"trust_remote_code": False}  # said aloud, as transformers would ask at the terminal
    try:
        config = AutoConfig.from_pretrained(source, **never)
        _refuse_kernels(config)
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            source,
            config=config,
            generation_config=_generation_config(source, config),
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
            **never,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **never)
    except Exception as error:  # transformers raises nearly every class for a bad folder
        raise UserError(_explain(source, error)) from error
    is_metro = isinstance(config, MetroT5Config)
    complain(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]) if is_metro else [],
        wrong_shapes=_wrong_shapes(source, model, info["mismatched_keys"]),
        source=source,
        model="the model that its config.json describes",
    )
    if is_metro:
        _check_vocabulary(source, config.vocab_size, len(tokenizer))
    return LoadedModel(model, tokenizer)


def _refuse_kernels(config) -> None:
    """A config.json may name attention code on the hub, which transformers would fetch and run."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = str(getattr(part, "_attn_implementation", None))
        if "/" in attention:
            raise UserError(
                f"config.json takes its attention from {attention} on the hub, which is code and "
                "is not run: take _attn_implementation out of it"
            )


def _generation_config(source: str, config) -> GenerationConfig:
    """Given to transformers by us: where it looks itself, versions before 5 run the Python file
    ``custom_generate/generate.py`` of a folder unasked."""
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # there is none: ids of start and end are in config.json
        generation = GenerationConfig.from_model_config(config)
    generation._from_model_config = False  # version 4 looks for a change of config otherwise
    return generation


def _wrong_shapes(source: str, model: PreTrainedModel, mismatched) -> list[str]:
    """What transformers reports: names and both shapes, names alone before version 5."""
    names = sorted(entry if isinstance(entry, str) else entry[0] for entry in mismatched)
    found = read_folder(source) if names and Path(source).is_dir() else {}
    needed = model.state_dict()
    return [
        f"{name} {tuple(found[name].shape) if name in found else ''} instead of "
        f"{tuple(needed[name].shape)}"
        for name in names
    ]


def _check_vocabulary(source: str, rows: int, entries: int) -> None:
    """As many embeddings as entries, or a few more (padded, which then makes a multiple of 8)."""
    padded = rows % 8 == 0 and 0 < rows - entries < PADDED_ROWS
    if rows != entries and not padded:
        raise UserError(
            f"{source}: the tokenizer has {entries} entries but config.json says vocab_size {rows}:"
            " sp.model, dict.txt, tokenizer_config.json (n_sentinel_tokens) and config.json must "
            "come from the same model"
        )


def _explain(source: str, error: Exception) -> str:
    """One line for what transformers, safetensors or torch say about a folder."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, pickle.UnpicklingError):
            return (
                f"the weights of {source} are refused, and nothing in them was run: they do not "
                "consist of tensors alone. Use weights whose origin you know"
            )
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    if Path(source).is_dir():
        return f"{source} cannot be loaded ({type(error).__name__}: {text[:600]})"
    return (
        f"{source} is no folder here, and cannot be loaded from the Hugging Face hub "
        f"({type(error).__name__}: {text[:300]}); without a network, copy its folder "
        "here and give the folder"
    )
