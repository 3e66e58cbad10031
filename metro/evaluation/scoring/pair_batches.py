"""Pairs of a source and a target, and their batches.

A batch has a budget of tokens and sources of similar length. The batches do not depend on the order
of the pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

GROUP_TOKENS = 256
"""Target tokens that are projected to the vocabulary together, at least."""


class Pair(NamedTuple):
    """Ids of a score log P(target | source)."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    """With end symbol, without start symbol."""


class Batch(NamedTuple):
    """Pairs that go through the model together."""

    sources: list[tuple[int, ...]]
    pairs: list[tuple[int, tuple[int, ...]]]
    """(index into sources, target)"""


def make_batches(pairs: Sequence[Pair], batch_tokens: int) -> list[Batch]:
    """Batch the distinct pairs by similar length, the longest first, for padding.

    A batch has at most ``batch_tokens`` tokens, sources counted once per pair (their keys and
    values are repeated) and padding included; a single longer pair is a batch of its own.
    """
    targets: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for source, target in sorted(set(pairs), key=lambda pair: (-len(pair.target), pair.target)):
        targets.setdefault(source, []).append(target)
    groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
    for source, mine in targets.items():  # those of a source may exceed the budget
        size = max(1, batch_tokens // (len(source) + len(mine[0])))
        groups += [(source, mine[i : i + size]) for i in range(0, len(mine), size)]
    # Target lengths in steps of 8: sources of one length stay together.
    groups.sort(key=lambda group: (-(len(group[1][0]) // 8), -len(group[0]), group))
    batches: list[Batch] = []
    longest_source = longest_target = 0
    for source, mine in groups:
        longest_source = max(longest_source, len(source))
        longest_target = max(longest_target, len(mine[0]))
        cost = longest_source + longest_target
        if not batches or (len(batches[-1].pairs) + len(mine)) * cost > batch_tokens:
            batches.append(Batch([], []))
            longest_source, longest_target = len(source), len(mine[0])
        batch = batches[-1]
        batch.pairs.extend((len(batch.sources), target) for target in mine)
        batch.sources.append(source)
    return batches


def group_batches(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Group neighbouring batches, to be projected to the vocabulary together."""
    groups: list[list[Batch]] = []
    size = 0
    for batch in batches:
        if not groups or size >= GROUP_TOKENS:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += sum(len(target) for _, target in batch.pairs)
    return groups


def make_packed_batches(pairs: Sequence[Pair], batch_tokens: int) -> list[Batch]:
    """Batch the distinct pairs without padding, those of long sources first.

    A batch has at most ``batch_tokens`` tokens; a source counts once in it. A single longer pair is
    a batch of its own.
    """
    batches: list[Batch] = []
    size = 0
    # In lexicographic order, where common beginnings are neighbours.
    for source, target in sorted(set(pairs), key=lambda pair: (-len(pair.source), pair)):
        is_new = not batches or batches[-1].sources[-1:] != [source]
        size += len(target) + (len(source) if is_new else 0)
        if not batches or size > batch_tokens:
            batches.append(Batch([], []))
            size, is_new = len(source) + len(target), True
        batch = batches[-1]
        if is_new:
            batch.sources.append(source)
        batch.pairs.append((len(batch.sources) - 1, target))
    return batches
