"""METRO models on the CPU: batches without padding, the answer choices of a source as one tree.

All sources of a batch are concatenated to one sequence; each sees only itself, and its positions
count from its own start. So are the decoder's inputs: those of one source form a tree whose root is
the start symbol and whose branches are the targets, common beginnings once, and each token sees its
ancestors: its attention is computed along the paths from the root. Only those are padded, and all
targets of a source read it without copies. Only attention differs (``packed_attention.py``);
everything else is the model's own code.

On GPUs one attention launch per source dominates, so padded batches are used there.

Shapes: N tokens of the sequence.
"""

import itertools
from collections.abc import Sequence

import torch

from metro.evaluation.scoring.packed_attention import (
    Packed,
    Paths,
    equal_parts,
    packed_attention,
    see_sources,
)
from metro.evaluation.scoring.pair_batches import Batch
from metro.evaluation.scoring.target_projection import Decoded
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
            Packed(equal_parts(lengths, lengths)),
        )
        hidden = run_stack(
            model.decoder,
            [token for tree in trees for token in tree.ids],
            [depth for tree in trees for depth in tree.depths],
            make_paths(trees),
            encoded,
            see_sources(model, equal_parts(sizes, lengths), encoded),
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
    tokens: list[torch.Tensor] = []
    places: dict[int, int] = {}
    end = 0
    for _, group in itertools.groupby(paths, lambda path: -(len(path) // -PATH_STEP)):
        alike = list(group)
        longest = len(alike[-1])
        for number, path in enumerate(alike):
            first = end + number * longest
            places |= zip(path, range(first, first + len(path)), strict=True)
        tokens.append(torch.tensor([path + path[:1] * (longest - len(path)) for path in alike]))
        end += tokens[-1].numel()
    return Paths(tokens, torch.tensor([places[token] for token in range(len(places))]))
