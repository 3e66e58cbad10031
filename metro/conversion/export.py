"""The Hugging Face folder of a METRO-T5: one that loads where nobody has heard of METRO.

``config.json``, ``generation_config.json``, ``model.safetensors``, the tokenizer's files, a model
card, and the Python files of ``metro/modeling`` as they are, named in ``auto_map``: whoever has not
installed METRO loads the folder with ``trust_remote_code=True``, everybody else without.
"""

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import GenerationConfig

import metro.modeling
from metro.conversion.model_card import model_card
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from metro.models.fairseq_checkpoint import untied
from metro.utils.files import new_folder
from metro.utils.messages import UserError

EXPORTED_CODE = (
    "configuration_metro_t5.py",
    "attention_metro_t5.py",
    "layers_metro_t5.py",
    "modeling_metro_t5.py",
    "text_metro_t5.py",
    "tokenization_metro_t5.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_metro_t5.MetroT5Config",
    "AutoModel": "modeling_metro_t5.MetroT5EncoderModel",
    "AutoModelForSeq2SeqLM": "modeling_metro_t5.MetroT5ForConditionalGeneration",
    "AutoModelForTextEncoding": "modeling_metro_t5.MetroT5EncoderModel",
}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": ["tokenization_metro_t5.MetroT5Tokenizer", None]}
WEIGHTS, PRETRAINING_WEIGHTS = "model.safetensors", "pretraining.safetensors"
TRAINING = "training.json"
OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path", "added_tokens_decoder")


def export_model(
    model: MetroT5ForConditionalGeneration,
    tokenizer: MetroT5Tokenizer,
    out: str | Path,
    *,
    summary: str = "",
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in memory as a folder that loads anywhere.

    Args:
        model: a METRO-T5; its weights are written with the types they have.
        tokenizer: of the model.
        out: the folder to make.
        summary: a sentence or two for the model card: what this model is.
        training: what the card's table says about the training, by name.
        overwrite: replace the folder where it is there.

    Raises:
        ValueError: ``out`` is there, or ``model`` is no METRO-T5.
    """
    if not isinstance(model, MetroT5ForConditionalGeneration):
        raise UserError(
            f"{type(model).__name__} is not METRO-T5: save it with its own save_pretrained"
        )
    state = {name: tensor.detach().cpu() for name, tensor in untied(model.state_dict()).items()}
    out = Path(out)
    card = model_card(out.name, summary, model.config, state, training or {})
    write_folder(out, model.config, model.generation_config, state, tokenizer, card, overwrite)


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
    """Write all files of an export. The folder appears when it is complete, ``config.json`` last.

    Args:
        out: the folder to make.
        config, generation, weights, tokenizer, card: what goes into the files; the embedding
            matrix is among the weights once, as ``shared.weight``.
        overwrite: replace the folder where it is there.
        pretraining_weights: auxiliary model and RTD head, where they are kept.
        training: settings of the training, for the way back to fairseq.
        inputs: what is read, which must not lie in a folder that is replaced.

    Raises:
        ValueError: ``out`` is there and must not be replaced.
    """
    with new_folder(out, overwrite, inputs) as folder:
        source = Path(metro.modeling.__file__).parent
        for name in EXPORTED_CODE:
            shutil.copyfile(source / name, folder / name)
        _save(weights, folder / WEIGHTS)
        if pretraining_weights:
            _save(pretraining_weights, folder / PRETRAINING_WEIGHTS)
        if training is not None:
            _write_json(folder / TRAINING, training)
        _save_tokenizer(tokenizer, folder, config.max_positions)
        generation.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _write_json(folder / "config.json", config_fields(config, weights["shared.weight"].dtype))


def config_fields(config: MetroT5Config, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json``: every size and constant, those with their default value too."""
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
    """As the tokenizer saves itself, with ``auto_map`` and without what only this machine means."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields = {name: value for name, value in fields.items() if name not in OF_THIS_MACHINE}
    fields["model_max_length"] = min(fields.get("model_max_length", max_positions), max_positions)
    fields |= {"auto_map": TOKENIZER_AUTO_MAP, "tokenizer_class": "MetroT5Tokenizer"}
    _write_json(path, fields)


def _write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
