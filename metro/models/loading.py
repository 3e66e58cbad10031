"""``metro.load``: a model and its tokenizer from a name, a folder, or a fairseq checkpoint."""

import contextlib
import json
import os
import pickle
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.models.adapters import TOKENIZER_FILES, adapter_folder, has_tokenizer, merge_adapter
from metro.models.auto_classes import register
from metro.models.fairseq_checkpoint import (
    TIED,
    generation_config,
    read_checkpoint,
    untied,
)
from metro.models.placement import Memory, placement
from metro.models.reading import check_readable, refuse_weights, shards
from metro.models.source import adapter_base, check_as_written, model_source
from metro.models.vocabulary_folder import build_tokenizer, check_vocabulary, find_vocabulary
from metro.ops.dispatch import cpu_multiplies_bf16, gpu_multiplies_bf16
from metro.utils.checksums import damage
from metro.utils.messages import UserError
from metro.utils.network import hub_address, is_reachable, use_cache_without_network

BAD_FOLDER = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    ImportError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
"""Errors of transformers for an unusable folder or hub id."""


HOST = ("cpu", "disk")
"""Places of a ``device_map`` that are no GPU."""


class LoadedModel(NamedTuple):
    """A model and its tokenizer."""

    model: PreTrainedModel
    """In evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer the model was trained with."""


def load(
    path_or_name: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    vocab: str | os.PathLike | None = None,
    device_map: str | dict | None = None,
    max_memory: Memory | None = None,
    load_in: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer, never running code that comes with a model.

    Args:
        path_or_name: a registered name (``metro models`` lists them), an id on the Hugging Face
            hub, a Hugging Face folder of any sequence-to-sequence model (METRO's own exports and
            the released METRO-T0 folders included), an adapter of PEFT (a folder or hub id), which
            is merged into its base model, or a fairseq checkpoint ``.pt``.
        dtype: of the weights in memory; by default as the model's configuration says. ``fast`` is
            bfloat16 where the device (of a ``device_map``: a GPU, if there is one) multiplies it
            faster than float32, and else float32.
        device: where to put the model; by default the CPU.
        attn_implementation: ``"eager"`` or ``"sdpa"``.
        vocab: folder with ``sp.model`` and ``dict.txt``, for fairseq checkpoints; by default the
            folder that the checkpoint was trained on.
        device_map: instead of a device, for a large model: ``"auto"`` spreads it over GPUs, CPU and
            disk; or a part of the model -> device, ``"cpu"`` or ``"disk"``.
        max_memory: limits of a ``device_map`` by name, such as ``{0: "70GB", "cpu": "100GB"}``; by
            default what is free, under ``torchrun`` this process's share of it.
        load_in: ``"8bit"`` or ``"4bit"``: linear layers in so many bits, computed in ``dtype``. An
            adapter stays beside them.

    Raises:
        UserError: no such model, an option that does not suit it, or files that are damaged or do
            not belong together.
        MissingPackage: accelerate or bitsandbytes, which an option needs, is not installed.
    """
    register()
    dtype = fast_dtype(device, device_map, load_in) if dtype == "fast" else resolve_dtype(dtype)
    options = placement(device, device_map, load_in, dtype, max_memory)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    # Weights on disk are read from the model's own files; other kinds of files are written anew.
    scratch = tempfile.TemporaryDirectory(prefix="metro-") if device_map is not None else None
    if scratch is not None:
        options["offload_folder"] = scratch.name
    with _quiet():
        loaded = _load(path_or_name, vocab, dtype, options)
    model = loaded.model.eval()
    if scratch is not None:
        weakref.finalize(model, scratch.cleanup)
    if padding := [*range(len(loaded.tokenizer), getattr(model.config, "vocab_size", 0))]:
        known = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = sorted({*known, *padding})  # rows of no token
    if device is not None and not load_in:
        model = model.to(device)
    return LoadedModel(model, loaded.tokenizer)


def _load(path_or_name: str | os.PathLike, vocab, dtype, options: dict, above=()) -> LoadedModel:
    path = Path(path_or_name)
    if path.is_file():
        return _from_checkpoint(path, vocab, dtype, options)
    source = model_source(path_or_name)
    check_as_written(path)
    if not path.exists():
        use_cache_without_network()
    with _explained(source):
        folder = adapter_folder(source)
    if folder is not None:
        base = adapter_base(folder, above)
        loaded = _load(base, vocab, dtype, options, (*above, folder.resolve()))
        tokenizer = read_tokenizer(str(folder)) if has_tokenizer(folder) else loaded.tokenizer
        with _explained(source):
            model = merge_adapter(loaded.model, folder, merge="quantization_config" not in options)
            if (folder / "generation_config.json").is_file():  # as after finetuning
                model.generation_config = _generation_config(str(folder), model.config)
                start = model.generation_config.decoder_start_token_id
                model.config.decoder_start_token_id = start
        return LoadedModel(_named(model, source), tokenizer)
    if vocab is not None:
        raise UserError(
            f"vocab is {os.fspath(vocab)!r}, but {path_or_name} is not a fairseq checkpoint: "
            "other models bring their own vocabulary; leave vocab out"
        )
    return _from_pretrained(source, dtype, options)


def fast_dtype(
    device: torch.device | str | None,
    device_map: str | dict | None = None,
    load_in: str | None = None,
) -> torch.dtype:
    """Choose bfloat16 where a model loaded so is faster in it, else float32."""
    if isinstance(device_map, dict):
        device = next((place for place in device_map.values() if place not in HOST), "cpu")
    elif device is None and (device_map or load_in):
        device = "cuda"
    if str(device).startswith("cuda") or isinstance(device, int):
        has_bf16 = gpu_multiplies_bf16(device)
    else:
        has_bf16 = cpu_multiplies_bf16()
    return torch.bfloat16 if has_bf16 else torch.float32


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Translate ``"bfloat16"``, ``"bf16"``, ... to torch's types, ``None`` and ``"auto"`` to None.

    Raises:
        UserError: not a floating point type.
    """
    if dtype is None or dtype == "auto":
        return None
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype is {dtype!r}; use float32, bfloat16, float16 or auto")
    return found


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence transformers' progress bars, which come with every file that is read or written."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and tables: :func:`load` reports all errors itself."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _from_checkpoint(path: Path, vocab, dtype, options: dict) -> LoadedModel:
    if "offload_folder" in options or "quantization_config" in options:
        raise UserError(
            f"{path} is a fairseq checkpoint, which is loaded whole: for device_map and load_in "
            f"convert it first, metro convert to-hf {path} --out MODEL"
        )
    checkpoint = read_checkpoint(path)
    folder = vocab or find_vocabulary(checkpoint.task, path)
    count = checkpoint.task.get("tokens_per_sample")
    tokenizer = build_tokenizer(folder, checkpoint.config.vocab_size, count)
    # Copied: the checkpoint's tensors are views of the file, which may be overwritten.
    state = {name: tensor.clone() for name, tensor in untied(checkpoint.main).items()}
    model = MetroT5ForConditionalGeneration.from_pretrained(
        None,
        config=checkpoint.config,
        state_dict=state,
        dtype=state["shared.weight"].dtype if dtype is None else dtype,
        **options,
    )
    model.generation_config = generation_config(checkpoint)
    return LoadedModel(_named(model, str(path)), tokenizer)


def _named(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """Tell a model where it is from: adapters trained on it name their base by that."""
    model.name_or_path = model.config._name_or_path = source
    return model


def _from_pretrained(source: str, dtype, options: dict) -> LoadedModel:
    config = read_config(source)
    if not config.is_encoder_decoder:
        raise UserError(
            f"{source} is a model of type {config.model_type}, without encoder and decoder: use a "
            "sequence-to-sequence model (T5, BART, METRO, ...)"
        )
    with _explained(source):
        for index in sorted(Path(source).glob("*.index.json")):
            shards(index)
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            source,
            config=config,
            generation_config=_generation_config(source, config),
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    tokenizer = read_tokenizer(source)
    is_metro = isinstance(config, MetroT5Config)
    refuse_weights(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]) if is_metro else [],
        wrong_shapes=[
            f"{name} {tuple(found)} instead of {tuple(needed)}"
            for name, found, needed in sorted(info["mismatched_keys"])
        ],
        source=source,
        model="the model that its config.json describes",
    )
    if is_metro:
        _check_one_embedding(source, model)
        check_vocabulary(source, config.vocab_size, len(tokenizer))
    return LoadedModel(model, tokenizer)


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Read a tokenizer; of a folder without one, transformers would make an empty one."""
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        raise UserError(
            f"{source} has no tokenizer: save it beside the model (tokenizer.save_pretrained), or "
            "copy its files from the model that this one was made from"
        )
    with _explained(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def read_config(source: str | os.PathLike) -> PretrainedConfig:
    """Read the configuration of a folder or hub id.

    Raises:
        UserError: no or a damaged ``config.json``, or one that asks for code to be run.
    """
    register()
    with _explained(os.fspath(source)):
        # False, not the default: transformers would ask at the terminal.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    # A config.json may name attention code on the hub, which transformers would fetch and run.
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = str(getattr(part, "_attn_implementation", None))
        if "/" in attention:
            raise UserError(
                f"the config.json of {os.fspath(source)} takes its attention from {attention} on "
                "the hub, which is code and is not run: take _attn_implementation out of it"
            )
    return config


def _generation_config(source: str, config) -> GenerationConfig:
    """Read the generation settings, and check them, which transformers does not."""
    path = cached_file(
        source, "generation_config.json", _raise_exceptions_for_missing_entries=False
    )
    if path is None:  # the start and end ids are in config.json
        generation = GenerationConfig.from_model_config(config)
    else:
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            generation = GenerationConfig.from_dict(fields)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
                value = fields.get(name)
                for index in value if isinstance(value, list) else [value]:
                    if index is not None and not 0 <= index < getattr(config, "vocab_size", 2**31):
                        raise ValueError(f"{name} {index} is not in the vocabulary")
        except (ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path} is damaged ({reason}): copy it again") from None
    if generation.decoder_start_token_id is None and generation.bos_token_id is None:
        generation.decoder_start_token_id = getattr(config, "decoder_start_token_id", None)
    return generation


def _check_one_embedding(source: str, model: PreTrainedModel) -> None:
    """Refuse copies of the embedding matrix that differ, which transformers leaves apart."""
    apart = [name for name in TIED if model.get_parameter(name) is not model.shared.weight]
    if apart:
        raise UserError(
            f"{source}: {', '.join(apart)} differs from shared.weight, but METRO-T5 has one "
            "embedding matrix: take out the copies that were not trained"
        )


@contextlib.contextmanager
def _explained(source: str):
    """Turn errors of transformers, safetensors or torch about a folder into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, BAD_FOLDER) and type(error) is not Exception:  # of tokenizers
            raise
        raise UserError(_explain(source, error)) from None


def _explain(source: str, error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, pickle.UnpicklingError):
            return (
                f"the weights of {source} are refused, and nothing in them was run: they do not "
                "consist of tensors alone. Use weights from a source you trust"
            )
        cause = cause.__cause__ or cause.__context__
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if Path(source).is_dir():
        check_readable(Path(source))
        return f"{source} cannot be loaded ({'; '.join([text[:600], *damage(Path(source))])})"
    if not is_reachable(hub_address()):
        why = f"is neither a folder nor in the cache, and the hub {hub_address()} cannot be reached"
        return f"{source} {why}: copy its folder here and name the folder"
    why = f"is not a folder, and cannot be loaded from the Hugging Face hub ({text[:300]})"
    return f"{source} {why}; without a network, copy its folder here and name the folder"
