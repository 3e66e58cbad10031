"""METRO models on the CPU: batches without padding, the options of a source as one tree.

All sources of a batch stand in one row behind each other, each sees only itself, and its positions
count from its own start. So do the decoder's inputs: those of one source are a tree whose root is
the start symbol and whose branches are the options, common beginnings once, and each token sees its
ancestors. Nothing is padded, and the keys and values of a source are read by all its options
without being copied. Only attention knows of it; everything else is the model's own code.

A GPU would wait for the launch of each tree's attention: there, padded batches are faster.

Letters: N tokens of a row, S tokens of one source, T of one tree, L of the longest, R equal ones in
a run, H heads, K head width.
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
from metro.evaluation.scoring.target_projection import DecodedRows
from metro.fuse import fused_feed_forward
from metro.modeling.attention_metro_t5 import Attention, bias_of_pairs
from metro.modeling.layers_metro_t5 import FeedForward
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration

TREE_TOKENS = 192
"""Options with more are several trees: attention looks at all pairs of a tree's tokens."""


def can_pack(model) -> bool:
    """Whether a model is one of those that this file is for."""
    is_metro = isinstance(model, MetroT5ForConditionalGeneration)
    return is_metro and model.device.type == "cpu" and model.config._attn_implementation != "eager"


class Tree:
    """Options of one source as the decoder reads them, and what is asked of each token."""

    def __init__(self, owner: int, start: int):
        self.owner = owner
        """Index of the source."""
        self.ids, self.depths, self.parents = [start], [0], [0]
        self.children: dict[tuple[int, int], int] = {}
        self.asked: list[tuple[int, int, int]] = []
        """(place that predicts the token, token, index of the pair)"""

    def add(self, pair: int, target: Sequence[int]) -> None:
        place = 0
        for depth, token in enumerate(target, 1):
            self.asked.append((place, token, pair))
            if depth == len(target):
                break
            child = self.children.setdefault((place, token), len(self.ids))
            if child == len(self.ids):
                self.ids.append(token)
                self.depths.append(depth)
                self.parents.append(place)
            place = child

    def mask(self) -> torch.Tensor:
        """T,T to be added to the scores: 0 where a token sees another, else the lowest number."""
        visible = torch.eye(len(self.ids), dtype=torch.bool)
        for place in range(1, len(self.ids)):
            visible[place] |= visible[self.parents[place]]
        return torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)


def grow_trees(batch: Batch, start: int) -> list[Tree]:
    """The trees of a batch, those of a source one after the other."""
    trees: list[Tree] = []
    for pair, (owner, target) in enumerate(batch.pairs):
        is_full = trees and len(trees[-1].ids) + len(target) > TREE_TOKENS
        if not trees or trees[-1].owner != owner or is_full:
            trees.append(Tree(owner, start))
        trees[-1].add(pair, target)
    return trees


class Run(NamedTuple):
    """Neighbours of the same size in a row of tokens, whose attention is computed together."""

    count: int
    queries: slice
    keys: slice
    mask: torch.Tensor | None
    """R,1,T,T to be added to the scores."""


class Packed(NamedTuple):
    """Who sees whom in a row of tokens; takes the place of the model's ``Visibility``."""

    runs: list[Run]
    longest: int


def attend_packed(q_1HNK, k_1HNK, v_1HNK, bias_HN, packed: Packed, *_, **__):
    """:func:`metro.modeling.attention_metro_t5.attend` within each part of a row of tokens."""
    num_tokens, longest, bias_1HLL = k_1HNK.shape[2], packed.longest, None
    if bias_HN is not None:
        near = slice(num_tokens - longest, num_tokens + longest - 1)
        bias_1HLL = bias_of_pairs(bias_HN[:, near], longest).to(q_1HNK.dtype)
    _, num_heads, num_queries, width = q_1HNK.shape
    out_1NHK = q_1HNK.new_empty(1, num_queries, num_heads, width)
    for run in packed.runs:
        # R,H,T,K, where the tokens lie.
        q, k, v = (
            x[0, :, part].unflatten(1, (run.count, -1)).transpose(0, 1)
            for x, part in ((q_1HNK, run.queries), (k_1HNK, run.keys), (v_1HNK, run.keys))
        )
        mask = run.mask
        if bias_1HLL is not None:
            mask = bias_1HLL[:, :, : q.shape[2], : k.shape[2]]
        out = F.scaled_dot_product_attention(q, k, v, mask)
        out_1NHK[0, run.queries].unflatten(0, (run.count, -1)).copy_(out.transpose(1, 2))
    return out_1NHK.transpose(1, 2), None


_patching = threading.Lock()


@contextlib.contextmanager
def packed_attention(model):
    """Let the model's attention take :class:`Packed`, and its feed-forward compute in place.

    One thread at a time: several may score the same model, each waits for its turn. Meanwhile the
    model must not be used in other ways.
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


def runs_of(sizes: Sequence[int]) -> list[tuple[int, int, slice]]:
    """(first, count, tokens) of each run of equal sizes."""
    runs, first, token = [], 0, 0
    for size, equal in itertools.groupby(sizes):
        count = len(list(equal))
        runs.append((first, count, slice(token, token + size * count)))
        first, token = first + count, token + size * count
    return runs


def run_stack(stack, ids: Sequence[int], places: Sequence[int], *seen) -> torch.Tensor:
    """Hidden states 1,N,D of a row of tokens, given the place of each in its own sequence."""
    rows = stack.position_ids(None, max(places) + 1, 0)[0]
    embeds = stack.embed_tokens(torch.tensor([ids])) + stack.pos_embed(rows[torch.tensor([places])])
    hidden = stack.first_layer_norm(embeds)
    for block in stack.block:
        hidden, _, _ = block(hidden, *seen)
    return hidden


@torch.inference_mode()
def decode_packed(model, batch: Batch) -> tuple[DecodedRows, torch.Tensor, torch.Tensor | None]:
    """Hidden states that predict the targets of a batch, and the projection's weight and bias."""
    head = model.get_output_embeddings()
    lengths = [len(source) for source in batch.sources]
    trees = grow_trees(batch, model.config.decoder_start_token_id)
    sizes = [len(tree.ids) for tree in trees]
    alone = [Run(count, part, part, None) for _, count, part in runs_of(lengths)]
    own = []
    for first, count, part in runs_of(sizes):
        masks = torch.stack([tree.mask() for tree in trees[first : first + count]])
        own.append(Run(count, part, part, masks.unsqueeze(1).to(model.dtype)))
    with packed_attention(model):
        encoded = run_stack(
            model.encoder,
            [token for source in batch.sources for token in source],
            [place for length in lengths for place in range(length)],
            Packed(alone, max(lengths)),
        )
        hidden = run_stack(
            model.decoder,
            [token for tree in trees for token in tree.ids],
            [depth for tree in trees for depth in tree.depths],
            Packed(own, max(sizes)),
            encoded,
            Packed(cross_runs(trees, lengths), max(lengths)),
        )
    starts = itertools.accumulate(sizes, initial=0)
    asked = [
        (start + place, token, pair)
        for tree, start in zip(trees, starts, strict=False)
        for place, token, pair in tree.asked
    ]
    row_N, target_N, pair_N = torch.tensor(asked).unbind(1)
    weight, bias = (x if x is None else x.to(hidden.dtype) for x in (head.weight, head.bias))
    return DecodedRows(hidden[0], row_N, target_N, pair_N), weight, bias


def cross_runs(trees: Sequence[Tree], lengths: Sequence[int]) -> list[Run]:
    """Which source each tree reads."""
    starts = list(itertools.accumulate(lengths, initial=0))
    runs, token = [], 0

    def kind(numbered) -> tuple[int, int, int]:
        """Alike for trees of one size that read neighbouring sources of one length."""
        number, tree = numbered
        return len(tree.ids), lengths[tree.owner], tree.owner - number

    for (size, length, _), equal in itertools.groupby(enumerate(trees), kind):
        equal = list(equal)
        count, first = len(equal), starts[equal[0][1].owner]
        queries = slice(token, token + size * count)
        runs.append(Run(count, queries, slice(first, first + length * count), None))
        token = queries.stop
    return runs
