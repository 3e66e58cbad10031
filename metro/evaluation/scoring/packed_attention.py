"""Attention within a packed sequence: each source sees itself, each token of a tree its ancestors.

What a METRO model's attention sees is said by one of three classes, which take the place of its
``Visibility``: :class:`Packed`, :class:`Paths`, and for few tokens that read long sources
:class:`Unprojected`.

Shapes: N tokens of the sequence, M of that which is read, T of a part of it, S of its keys, L of
the longest, R parts or paths of equal size, H heads, K head width, D d_model.
"""

import contextlib
import itertools
import threading
from collections.abc import Sequence
from math import prod
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from metro.fusion import fused_feed_forward, fused_project
from metro.modeling.attention_metro_t5 import Attention, bias_of_pairs
from metro.modeling.layers_metro_t5 import FeedForward
from metro.ops.dispatch import attends_in_float32


class Parts(NamedTuple):
    """Consecutive parts of the sequence of equal size, whose attention is computed together."""

    number: int
    queries: slice
    keys: slice

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys of each part."""
        seen = self.queries, self.keys
        num_queries, num_keys = ((x.stop - x.start) // self.number for x in seen)
        return num_queries, num_keys


def equal_parts(sizes: Sequence[int], lengths: Sequence[int]) -> list[Parts]:
    """Let the queries of each part see its keys; ``sizes`` and ``lengths`` count both.

    Neighbours that have as many of both are computed together.
    """
    found: list[Parts] = []
    first_query = first_key = 0
    for (size, length), group in itertools.groupby(zip(sizes, lengths, strict=True)):
        number = len(list(group))
        queries = slice(first_query, first_query + size * number)
        keys = slice(first_key, first_key + length * number)
        found.append(Parts(number, queries, keys))
        first_query, first_key = queries.stop, keys.stop
    return found


def attention_input(x: torch.Tensor) -> torch.Tensor:
    """Queries, keys, values or bias in the type to compute with."""
    return x.float() if attends_in_float32(x) else x


class Packed(NamedTuple):
    """Each part of the sequence sees the keys of its own part, all of them.

    Like :class:`Paths` it takes the place of the model's ``Visibility``.
    """

    parts: list[Parts]

    def attend(self, q_1HNK, k_1HNK, v_1HNK, bias_HN) -> torch.Tensor:
        bias_1HLL = None
        if bias_HN is not None:
            num_tokens, longest = k_1HNK.shape[2], max(parts.sizes[1] for parts in self.parts)
            near = slice(num_tokens - longest, num_tokens + longest - 1)
            bias_1HLL = bias_of_pairs(attention_input(bias_HN[:, near].to(q_1HNK.dtype)), longest)
        _, num_heads, num_queries, width = q_1HNK.shape
        out_1NHK = q_1HNK.new_empty(1, num_queries, num_heads, width)
        for parts in self.parts:
            q_RHTK, k_RHTK, v_RHTK = (
                attention_input(x[0, :, tokens]).unflatten(1, (parts.number, -1)).transpose(0, 1)
                for x, tokens in (
                    (q_1HNK, parts.queries),
                    (k_1HNK, parts.keys),
                    (v_1HNK, parts.keys),
                )
            )
            bias = bias_1HLL
            if bias is not None:
                bias = bias[:, :, : q_RHTK.shape[2], : k_RHTK.shape[2]]
            out_RHTK = F.scaled_dot_product_attention(q_RHTK, k_RHTK, v_RHTK, bias)
            out_RTHK = out_1NHK[0, parts.queries].unflatten(0, (parts.number, -1))
            out_RTHK.copy_(out_RHTK.transpose(1, 2))
        return out_1NHK.transpose(1, 2)


class Paths(NamedTuple):
    """Each token sees its ancestors in a tree: attention is causal along a path from the start."""

    tokens: list[torch.Tensor]
    """R,T places in the sequence; shorter paths are filled up at their end, which nobody sees."""
    place_N: torch.Tensor
    """Where each token of the sequence is among those of all paths."""

    def attend(self, q_1HNK, k_1HNK, v_1HNK, _) -> torch.Tensor:
        out = []
        for tokens_RT in self.tokens:
            q_RHTK, k_RHTK, v_RHTK = (
                attention_input(x_1HNK[0].transpose(0, 1)[tokens_RT]).transpose(1, 2)
                for x_1HNK in (q_1HNK, k_1HNK, v_1HNK)
            )
            out_RHTK = F.scaled_dot_product_attention(q_RHTK, k_RHTK, v_RHTK, is_causal=True)
            out.append(out_RHTK.transpose(1, 2).flatten(0, 1).to(q_1HNK.dtype))
        return torch.cat(out)[self.place_N].transpose(0, 1).unsqueeze(0)


class Unprojected(NamedTuple):
    """:class:`Packed` without bias, reading hidden states instead of keys and values.

    The score ``q (W_k s + b_k)`` of a state s is ``(W_k^T q) s`` and a number that all keys of a
    query share, which softmax ignores; and as weights w sum to 1, ``sum w (W_v s + b_v)`` is
    ``W_v (sum w s) + b_v``. So the matrices meet the tokens that read, not those that are read.
    """

    parts: list[Parts]

    def attend(self, attention: Attention, hidden_1ND, states_1MD) -> torch.Tensor:
        """N,HK: what the heads read."""
        heads = attention.config.num_heads
        [q_1NI] = attention.project(hidden_1ND, attention.q)
        q_HNK = q_1NI[0].unflatten(1, (heads, -1)).transpose(0, 1)
        k_HKD, v_HKD = (
            layer.weight.unflatten(0, (heads, -1)) for layer in (attention.k, attention.v)
        )
        q_NHD = (q_HNK @ k_HKD).transpose(0, 1).contiguous()
        read_NHD = torch.empty_like(q_NHD)
        for parts in self.parts:
            q_RTD = attention_input(q_NHD[parts.queries]).reshape(parts.number, -1, q_NHD.shape[2])
            states_RSD = attention_input(states_1MD[0, parts.keys]).unflatten(0, (parts.number, -1))
            scores_RTS = (q_RTD @ states_RSD.transpose(1, 2)).mul_(q_HNK.shape[2] ** -0.5)
            read_RTD = scores_RTS.softmax(-1) @ states_RSD
            read_NHD[parts.queries].view(read_RTD.shape).copy_(read_RTD)
        out_HNK = read_NHD.transpose(0, 1) @ v_HKD.transpose(1, 2)
        return out_HNK.transpose(0, 1).flatten(1) + attention.v.bias


def see_sources(model, parts: list[Parts], states_1MD: torch.Tensor) -> Packed | Unprojected:
    """Let the decoder's parts read their sources in the way that takes fewer multiplications.

    Always by keys and values where scores are of half precision: PyTorch's attention rounds them
    less than products do. So too where something else stands in a layer's place, as an adapter.
    Weights are not looked at: of a sharded model they exist in a layer's forward pass alone.
    """
    layers = [
        layer
        for name, layer in model.decoder.named_modules()
        if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    ]
    is_plain = all(type(layer) is nn.Linear for layer in layers)
    is_exact = attention_input(states_1MD[:, :0]).dtype.itemsize >= torch.float32.itemsize
    if not is_plain or not is_exact or torch.is_autocast_enabled(states_1MD.device.type):
        return Packed(parts)
    inner, width = layers[0].out_features, layers[0].in_features
    num_queries, num_keys = parts[-1].queries.stop, parts[-1].keys.stop
    num_pairs = sum(each.number * prod(each.sizes) for each in parts)
    projected = num_keys * inner * width + num_pairs * inner
    unprojected = num_queries * inner * width + num_pairs * model.config.num_heads * width
    return Unprojected(parts) if unprojected < projected else Packed(parts)


def attend_packed(q_1HNK, k_1HNK, v_1HNK, bias_HN, seen: Packed | Paths, *_, **__):
    """:func:`metro.modeling.attention_metro_t5.attend` within the parts or paths of a sequence."""
    return seen.attend(q_1HNK, k_1HNK, v_1HNK, bias_HN), None


def forward_packed(self: Attention, hidden_1ND, states_1MD, visibility, *_, **__):
    """:class:`~metro.modeling.attention_metro_t5.Attention`'s forward pass without a cache."""
    if isinstance(visibility, Unprojected):
        read_1NI = visibility.attend(self, hidden_1ND, states_1MD).unsqueeze(0)
        return self.project(read_1NI, self.o)[0], None
    return Attention.forward(self, hidden_1ND, states_1MD, visibility)


_patching = threading.Lock()


@contextlib.contextmanager
def packed_attention(model):
    """Let attention take the classes of this module, and layers compute as :func:`metro.fuse` does.

    Several threads may score the same model, one at a time. Meanwhile the model must not be used in
    other ways.
    """
    before = []
    with _patching:
        try:
            for module in model.modules():
                replaced = {}
                if isinstance(module, Attention):
                    replaced = {"attend": attend_packed, "project": fused_project}
                    replaced["forward"] = MethodType(forward_packed, module)
                elif isinstance(module, FeedForward):
                    replaced = {"forward": MethodType(fused_feed_forward, module)}
                for name, function in replaced.items():
                    before.append((module, name, vars(module).get(name)))
                    setattr(module, name, function)
            yield
        finally:
            for module, name, function in before:
                if function is None:
                    vars(module).pop(name, None)
                else:
                    setattr(module, name, function)
