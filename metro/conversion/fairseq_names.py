"""Parameter names: the original's fairseq checkpoints and METRO's models, as one table.

The original's names are those of its ``generator`` (auxiliary model), ``encoder`` / ``decoder``
(main model) and ``rtd_head``; METRO's are those of
:class:`metro.pretraining.model.MetroPretrainingModel`, whose ``main`` part has the names of the
released Hugging Face folders.
"""

import re

import torch

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
"""Names that carry nothing: version markers, and the auxiliary head's alias of its embedding."""


def metro_name(fairseq_name: str) -> str | None:
    """METRO's name of a parameter of the original, ``None`` for those that carry nothing.

    Raises:
        ValueError: a name that no METRO or T5 checkpoint of the original has.
    """
    if DROPPED.match(fairseq_name):
        return None
    if fairseq_name in OTHER_PARAMETERS:
        return OTHER_PARAMETERS[fairseq_name]
    if fairseq_name.startswith("rtd_head."):
        return fairseq_name
    for prefix, new_prefix in STACKS.items():
        rest = fairseq_name.removeprefix(prefix + ".")
        name, _, kind = rest.rpartition(".")
        if rest == fairseq_name:
            continue
        if name in STACK_PARAMETERS:
            return f"{new_prefix}.{STACK_PARAMETERS[name]}.{kind}"
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer and layer[2] in LAYER_PARAMETERS:
            last = 2 if prefix == "decoder" else 1
            new_name = LAYER_PARAMETERS[layer[2]].format(last=last)
            return f"{new_prefix}.block.{layer[1]}.{new_name}.{kind}"
    raise ValueError(
        f"{fairseq_name!r} is not a parameter of METRO or T5; is this checkpoint of another model?"
    )


def is_fairseq_state(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has the original's names."""
    return any(
        re.match(r"(encoder|decoder)\.(layers\.\d+|embed_positions)\.", name) for name in state
    )


def rename_fairseq_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the original under METRO's names, ready for ``MetroPretrainingModel``.

    The tied embedding appears under all of METRO's names for it. A plain T5 checkpoint gives the
    ``main.`` names alone.

    Raises:
        ValueError: a name that is not a METRO or T5 parameter.
    """
    renamed = {}
    for name, tensor in state.items():
        new_name = metro_name(name)
        if new_name is not None:
            renamed[new_name] = tensor
    if "main.encoder.embed_tokens.weight" in renamed:
        renamed["main.shared.weight"] = renamed["main.encoder.embed_tokens.weight"]
    return renamed
