"""Tables of names: the original's fairseq checkpoints and METRO's models.

``rename_fairseq_state`` translates from the original's names, ``original_state`` back to them.
This project's own fairseq checkpoints have METRO's names with the prefix ``model.``.

The original's names are those of its ``generator`` (auxiliary model), ``encoder`` / ``decoder``
(main model) and ``rtd_head``; METRO's are those of
:class:`metro.pretraining.model.MetroPretrainingModel`, whose ``main`` part has the names of the
released Hugging Face folders.
"""

import re

import torch

from metro.pretraining.configuration import MODEL_OPTIONS as MODEL_OPTIONS
from metro.utils.messages import UserError

STACKS = {
    "encoder": "main.encoder",
    "decoder": "main.decoder",
    "generator.sentence_encoder": "auxiliary.encoder",
}
"""Prefixes of the three stacks."""

STACK_PARAMETERS = {
    "embed_tokens": "embed_tokens",
    "embed_positions": "pos_embed",
    "layernorm_embedding": "first_layer_norm",
}
"""Inside a stack."""

LAYER_PARAMETERS = {
    "self_attn.q_proj": "layer.0.SelfAttention.q",
    "self_attn.k_proj": "layer.0.SelfAttention.k",
    "self_attn.v_proj": "layer.0.SelfAttention.v",
    "self_attn.out_proj": "layer.0.SelfAttention.o",
    "self_attn_rel_pos.rel_attn_bias": "layer.0.SelfAttention.relative_attention_bias",
    "self_attn_layer_norm": "layer.0.layer_norm",
    "encoder_attn.q_proj": "layer.1.EncDecAttention.q",
    "encoder_attn.k_proj": "layer.1.EncDecAttention.k",
    "encoder_attn.v_proj": "layer.1.EncDecAttention.v",
    "encoder_attn.out_proj": "layer.1.EncDecAttention.o",
    "encoder_attn_layer_norm": "layer.1.layer_norm",
    "fc1": "layer.{last}.DenseReluDense.wi",
    "fc2": "layer.{last}.DenseReluDense.wo",
    "final_layer_norm": "layer.{last}.layer_norm",
}
"""Inside ``layers.N`` / ``block.N``; ``{last}`` is 2 in a decoder and 1 in an encoder."""

OTHER_PARAMETERS = {
    "generator.lm_head.bias": "auxiliary.lm_head.bias",
    "generator.lm_head.dense.weight": "auxiliary.lm_head.dense.weight",
    "generator.lm_head.dense.bias": "auxiliary.lm_head.dense.bias",
    "generator.lm_head.layer_norm.weight": "auxiliary.lm_head.layer_norm.weight",
    "generator.lm_head.layer_norm.bias": "auxiliary.lm_head.layer_norm.bias",
    "decoder.output_projection.weight": "main.lm_head.weight",
}

DROPPED = re.compile(r"(.*\.)?version$|generator\.lm_head\.weight$")
"""Names without content: version markers, and the auxiliary head's alias of its embedding."""


def _all_parameters() -> dict[str, str]:
    """Map all names but the RTD head's, which are identical; ``#`` stands for a layer number."""
    names = {}
    for prefix, new_prefix in STACKS.items():
        is_decoder = prefix == "decoder"
        for old, new in STACK_PARAMETERS.items():
            names[f"{prefix}.{old}"] = f"{new_prefix}.{new}"
        for old, new in LAYER_PARAMETERS.items():
            if is_decoder or not old.startswith("encoder_attn"):
                new = new.format(last=2 if is_decoder else 1)
                names[f"{prefix}.layers.#.{old}"] = f"{new_prefix}.block.#.{new}"
    kinds = ("weight", "bias")
    names = {f"{old}.{kind}": f"{new}.{kind}" for old, new in names.items() for kind in kinds}
    return names | OTHER_PARAMETERS


METRO_NAMES = _all_parameters()
ORIGINAL_NAMES = {new: old for old, new in METRO_NAMES.items()}


def _translate(name: str, names: dict[str, str]) -> str | None:
    if name.startswith("rtd_head."):
        return name
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return names.get(name)
    translated = names.get(name.replace(layer[0], ".#.", 1))
    return translated and translated.replace("#", layer[1])


def metro_name(fairseq_name: str) -> str | None:
    """Return METRO's name of an original parameter, ``None`` for names without content.

    Raises:
        UserError: a name that no METRO or T5 checkpoint of the original has.
    """
    if DROPPED.match(fairseq_name):
        return None
    name = _translate(fairseq_name, METRO_NAMES)
    if name is None:
        raise UserError(
            f"{fairseq_name!r} is not a parameter of METRO or T5; is this checkpoint of another "
            "model?"
        )
    return name


def original_name(metro_name: str) -> str | None:
    """Return the original's name of a METRO parameter, ``None`` for the alias ``main.shared``.

    Raises:
        UserError: a name that METRO does not have.
    """
    if metro_name == "main.shared.weight":
        return None
    name = _translate(metro_name, ORIGINAL_NAMES)
    if name is None:
        raise UserError(f"{metro_name!r} is not a parameter of METRO")
    return name


def is_fairseq_state(state: dict[str, torch.Tensor]) -> bool:
    """Tell whether a state dict has the original's names."""
    return any(
        re.match(r"(encoder|decoder)\.(layers\.\d+|embed_positions)\.", name) for name in state
    )


def rename_fairseq_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict of the original for ``MetroPretrainingModel``.

    The tied embedding appears under all of METRO's names for it. A plain T5 checkpoint gives the
    ``main.`` names alone.

    Raises:
        UserError: a name that is not a METRO or T5 parameter.
    """
    renamed = {new: tensor for old, tensor in state.items() if (new := metro_name(old))}
    if "main.encoder.embed_tokens.weight" in renamed:
        renamed["main.shared.weight"] = renamed["main.encoder.embed_tokens.weight"]
    return renamed


def original_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict of METRO as the original: the inverse of ``rename_fairseq_state``.

    Adds the entries without content, which fairseq's strict loading asks for.

    Raises:
        UserError: a name that METRO does not have.
    """
    renamed = {old: tensor for new, tensor in state.items() if (old := original_name(new))}
    dtype = state["main.encoder.embed_tokens.weight"].dtype
    for prefix in STACKS:
        if any(name.startswith(prefix + ".") for name in renamed):
            renamed[f"{prefix}.version"] = torch.tensor([3.0], dtype=dtype)
    embedding = renamed.get("generator.sentence_encoder.embed_tokens.weight")
    if embedding is not None:
        renamed["generator.lm_head.weight"] = embedding
    return renamed


def rename_plugin_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict of this project's fairseq models, giving every name its ``main.``."""
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if any(name.startswith("main.") for name in state):
        return state
    return {f"main.{name}": tensor for name, tensor in state.items()}  # plain T5


def plugin_state(state: dict[str, torch.Tensor], is_metro: bool) -> dict[str, torch.Tensor]:
    """Invert ``rename_plugin_state``: names of model ``t5_metro``, or of ``transformer_t5``."""
    return {
        f"model.{name if is_metro else name.removeprefix('main.')}": tensor
        for name, tensor in state.items()
    }
