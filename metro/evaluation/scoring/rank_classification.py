"""Rank classification: the answer choice with the highest log-probability is the prediction.

An answer choice c of an example with prompt x scores

    direct   sum_t log P(c_t | x)               Sanh et al. (2022), METRO-T0
    channel  sum_t log P(x_t | c)               Min et al. (2022)
    flipped  sum_t log P(instruction_t | x, c)  Ye et al. (2023), equation 5; x without instruction

The sum runs over all target tokens, the end symbol included, and is not divided by their number
("sum", published); "mean" divides it; "calibrated" subtracts the score under an empty x.

From top to bottom: :meth:`RankClassifier.rank` makes a (source, target) pair of each answer choice
and takes the best score; ``pair_scoring.py`` computes log P(target | source) of the pairs with the
model, in batches; ``target_projection.py`` takes the log-softmax over the vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.instruction import model_texts
from metro.evaluation.scoring.pair_scoring import Pair, PairScorer
from metro.evaluation.tasks.examples import EvaluationExample
from metro.utils.messages import UserError


class Ranking(NamedTuple):
    """Scores and prediction for one example."""

    scores: list[float]
    """One per answer choice, higher is better."""
    prediction: int | None
    """Index of the best answer choice; the first of equals, or None for a minimal pair's tie."""


class RankClassifier:
    """Ranks the answer choices of examples by one method.

    Args:
        scorer: scores pairs with the model.
        encoder: turns text into ids as the model's protocol wants.
        method: ``direct``, ``channel`` or ``flipped``.
        normalization: ``sum``, ``mean`` or ``calibrated`` (direct and flipped only).
    """

    def __init__(
        self,
        scorer: PairScorer,
        encoder: PromptEncoder,
        method: str = "direct",
        normalization: str = "sum",
    ):
        self.scorer, self.encoder = scorer, encoder
        self.method, self.normalization = method, normalization
        self.num_indistinct = 0
        """Examples with different answer choices whose tokens are equal."""

    def rank(
        self,
        examples: Sequence[EvaluationExample],
        *,
        progress: Callable[[float], None] | None = None,
    ) -> list[Ranking]:
        """Score the answer choices of all examples, in their order.

        Args:
            examples: with ``flipped_input`` and ``instruction`` for the method flipped.
            progress: receives the share of the work that is done.
        """
        sources, targets = self.sources(examples), self.targets(examples)
        pairs = [Pair(s, t) for s, t in zip(sources, targets, strict=True)]
        scores = self.scorer.score(pairs, progress=progress)
        if self.normalization == "mean":
            scores = [score / len(pair.target) for score, pair in zip(scores, pairs, strict=True)]
        elif self.normalization == "calibrated":
            empty = [dataclasses.replace(e, input="", flipped_input="") for e in examples]
            reference = self.scorer.score(
                [Pair(s, t) for s, t in zip(self.sources(empty), targets, strict=True)]
            )
            scores = [score - other for score, other in zip(scores, reference, strict=True)]
        rankings, end, self.num_indistinct = [], 0, 0
        for example in examples:
            start, end = end, end + len(example.choices)
            mine = scores[start:end]
            rankings.append(Ranking(mine, mine.index(max(mine))))
            self.num_indistinct += len(set(pairs[start:end])) < example.num_distinct_choices
        return rankings

    def sources(self, examples: Sequence[EvaluationExample]) -> list[tuple[int, ...]]:
        """Encode the encoder's input, one per answer choice of each example."""
        flipped = self.method == "flipped"
        encode = self.encoder.labelled_sources if flipped else self.encoder.sources
        return encode_once([text for text, _ in self.texts(examples)], encode)

    def targets(self, examples: Sequence[EvaluationExample]) -> list[tuple[int, ...]]:
        """Encode the text whose probability is the score, one per answer choice of each example."""
        return encode_once([text for _, text in self.texts(examples)], self.encoder.targets)

    def texts(self, examples: Sequence[EvaluationExample]) -> list[tuple[str, str]]:
        """Write what encoder and decoder read, one pair per answer choice of each example."""
        return [
            model_texts(self.method, e.input, choice, e.flipped_input, e.instruction)
            for e in examples
            for choice in e.choices
        ]


def check_distinct(sources: list[list[int]], choices: list[str]) -> None:
    """Check that all answer choices differ in their tokens, as equal ones would tie."""
    seen: dict[tuple[int, ...], str] = {}
    for source, choice in zip(sources, choices, strict=True):
        if (other := seen.get(tuple(source))) is not None:
            raise UserError(
                f"answer choices {other!r} and {choice!r} are the same to the model (equal "
                "tokens); give different ones"
            )
        seen[tuple(source)] = choice


def encode_once(
    texts: Sequence[str], encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
) -> list[tuple[int, ...]]:
    """Apply ``encode`` to the distinct texts; return the ids of every text."""
    distinct = list(dict.fromkeys(texts))
    ids = dict(zip(distinct, map(tuple, encode(distinct)), strict=True))
    return [ids[text] for text in texts]
