"""METRO models on the CPU: batches without padding, the answer choices of a source as one tree.

All sources of a batch are concatenated to one sequence; each sees only itself, and its positions
count from its own start. So are the decoder's inputs: those of one source form a tree whose root is
the start symbol and whose branches are the targets, common beginnings once, and each token sees its
ancestors: its attention is computed along the paths from the root. Only those are padded, and the
keys and values of a source are read by all its targets without being copied. Only attention
differs; everything else is the model's own code.

On GPUs one attention launch per source dominates, so padded batches are used there.

Shapes: N tokens of the sequence, T of a part of it, L of the longest, R parts or paths of equal
size, H heads, K head width.
"""

import contextlib
import itertools
import threading
from collections.abc import Sequence
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from metro.evaluation.scoring.pair_batches import Batch
from metro.evaluation.scoring.target_projection import Decoded
from metro.fusion import fused_feed_forward
from metro.modeling.attention_metro_t5 import Attention, bias_of_pairs
from metro.modeling.layers_metro_t5 import FeedForward
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from metro.models.placement import is_dispatched

PATH_STEP = 16
"""Paths are computed together with those of up to the same multiple of it; the rest is padding."""


def can_pack(model) -> bool:
    """Tell METRO models on the CPU whose attention may be replaced."""
    is_metro = isinstance(model, MetroT5ForConditionalGeneration)
    if not is_metro or is_dispatched(model):
        return False
    return model.device.type == "cpu" and model.config._attn_implementation != "eager"


class Tree:
    """Targets of one source as the decoder reads them, and the tokens that each position predicts.

    Args:
        start: id of the start symbol.
    """

    def __init__(self, start: int):
        self.ids, self.depths, self.parents = [start], [0], [-1]
        self.children: dict[tuple[int, int], int] = {}
        """(node, token) -> node."""
        self.asked: list[tuple[int, int, int]] = []
        """(node that predicts the token, token, index of the pair)."""

    def add(self, pair: int, target: Sequence[int]) -> None:
        """Add the target of a pair. Its last token is predicted and never read."""
        node = 0
        for depth, token in enumerate(target, 1):
            self.asked.append((node, token, pair))
            if depth == len(target):
                break
            child = self.children.setdefault((node, token), len(self.ids))
            if child == len(self.ids):
                self.ids.append(token)
                self.depths.append(depth)
                self.parents.append(node)
            node = child

    def paths(self) -> list[list[int]]:
        """The nodes from the start to each that has no child. A token sees those before it."""
        found = []
        for node in sorted(set(range(len(self.ids))).difference(self.parents)):
            path = [node]
            while path[-1] > 0:
                path.append(self.parents[path[-1]])
            found.append(path[::-1])
        return found


def grow_trees(batch: Batch, start: int) -> list[Tree]:
    """Make the tree of each source of a batch, in its order."""
    trees = [Tree(start) for _ in batch.sources]
    for pair, (owner, target) in enumerate(batch.pairs):
        trees[owner].add(pair, target)
    return trees


def attention_input(x: torch.Tensor) -> torch.Tensor:
    """Queries, keys, values or bias in the type to compute with: on CPUs without AMX not bfloat16.

    PyTorch's attention takes bfloat16 there and multiplies in float32, rounding in between.
    """
    in_float32 = x.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
    return x.float() if in_float32 else x


class Parts(NamedTuple):
    """Consecutive parts of the sequence of equal size, whose attention is computed together."""

    number: int
    queries: slice
    keys: slice


class Packed(NamedTuple):
    """Each part of the sequence sees the keys of its own part, all of them.

    Like :class:`Paths` it takes the place of the model's ``Visibility``.
    """

    parts: list[Parts]
    longest: int

    def attend(self, q_1HNK, k_1HNK, v_1HNK, bias_HN) -> torch.Tensor:
        num_tokens, longest, bias_1HLL = k_1HNK.shape[2], self.longest, None
        if bias_HN is not None:
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


def attend_packed(q_1HNK, k_1HNK, v_1HNK, bias_HN, seen: Packed | Paths, *_, **__):
    """:func:`metro.modeling.attention_metro_t5.attend` within the parts or paths of a sequence."""
    return seen.attend(q_1HNK, k_1HNK, v_1HNK, bias_HN), None


_patching = threading.Lock()


@contextlib.contextmanager
def packed_attention(model):
    """Let attention take :class:`Packed` or :class:`Paths`, and feed-forward compute in place.

    Several threads may score the same model, one at a time. Meanwhile the model must not be used in
    other ways.
    """
    before = []
    with _patching:
        try:
            for module in model.modules():
                replaced = {}
                if isinstance(module, Attention):
                    replaced = {"attend": attend_packed}
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


def run_stack(stack, ids: Sequence[int], positions: Sequence[int], *seen) -> torch.Tensor:
    """Run encoder or decoder on N tokens at their positions; return the hidden states 1,N,D.

    ``seen`` are further arguments of a block: who sees whom, and the same for the encoder's output.
    """
    rows = stack.position_ids(None, max(positions) + 1, 0)[0][torch.tensor([positions])]
    hidden = stack.first_layer_norm(stack.embed_tokens(torch.tensor([ids])) + stack.pos_embed(rows))
    for block in stack.block:
        hidden, _, _ = block(hidden, *seen)
    return hidden


@torch.inference_mode()
def decode_packed(model, batch: Batch) -> Decoded:
    """Compute the hidden states that predict the targets of a batch, packed."""
    lengths = [len(source) for source in batch.sources]
    trees = grow_trees(batch, model.config.decoder_start_token_id)
    sizes = [len(tree.ids) for tree in trees]
    with packed_attention(model):
        encoded = run_stack(
            model.encoder,
            [token for source in batch.sources for token in source],
            [position for length in lengths for position in range(length)],
            Packed(equal_parts(lengths, lengths), max(lengths)),
        )
        hidden = run_stack(
            model.decoder,
            [token for tree in trees for token in tree.ids],
            [depth for tree in trees for depth in tree.depths],
            make_paths(trees),
            encoded,
            Packed(equal_parts(sizes, lengths), max(lengths)),
        )
    starts = itertools.accumulate(sizes, initial=0)
    asked = [
        (start + node, token, pair)
        for tree, start in zip(trees, starts, strict=False)
        for node, token, pair in tree.asked
    ]
    row_N, target_N, pair_N = torch.tensor(asked).unbind(1)
    head = model.get_output_embeddings()
    weight, bias = head.weight.to(hidden.dtype), head.bias
    bias = None if bias is None else bias.to(hidden.dtype)
    return Decoded(hidden[0], row_N, target_N, pair_N, weight, bias)


def make_paths(trees: Sequence[Tree]) -> Paths:
    """Let each token of the trees see its ancestors and itself."""
    starts = itertools.accumulate((len(tree.ids) for tree in trees), initial=0)
    paths = [
        [start + node for node in path]
        for tree, start in zip(trees, starts, strict=False)
        for path in tree.paths()
    ]
    paths.sort(key=len)
    tokens, places, end = [], {}, 0
    for _, group in itertools.groupby(paths, lambda path: -(len(path) // -PATH_STEP)):
        alike = list(group)
        longest = len(alike[-1])
        for number, path in enumerate(alike):
            first = end + number * longest
            places |= zip(path, range(first, first + len(path)), strict=True)
        tokens.append(torch.tensor([path + path[:1] * (longest - len(path)) for path in alike]))
        end += tokens[-1].numel()
    return Paths(tokens, torch.tensor([places[token] for token in range(len(places))]))


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
