"""Rank classification: the option with the highest log-probability is the prediction.

    direct   sum_t log P(option_t  | prompt)         Sanh et al. (2022), METRO-T0
    channel  sum_t log P(prompt_t  | option)         Min et al. (2022)
    flipped  sum_t log P(instruction_t | x, option)  Ye et al. (2023), equation 5

The sum runs over all target tokens, the end symbol included, and is not divided by their number.
How it is computed is in ``pair_scoring.py``.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.instruction import encoder_text
from metro.evaluation.scoring.pair_scoring import Pair, PairScorer
from metro.evaluation.tasks.examples import EvaluationExample
from metro.utils.messages import UserError

METHODS = ("direct", "channel", "flipped")
NORMALIZATIONS = ("sum", "mean", "calibrated")


class Ranking(NamedTuple):
    """The outcome for one example."""

    scores: list[float]
    """One per option, higher is better."""
    prediction: int
    """Index of the best option; the first of equals."""


class RankClassifier:
    """Ranks the options of examples by one method.

    Args:
        scorer: scores pairs with the model.
        encoder: turns text into ids as the model's protocol wants.
        method: ``direct``, ``channel`` or ``flipped``.
        normalization: ``sum`` (published); ``mean``, the sum divided by the number of target
            tokens; ``calibrated``, the sum less that of the same option under an empty input
            (direct and flipped only).
    """

    def __init__(
        self,
        scorer: PairScorer,
        encoder: PromptEncoder,
        method: str = "direct",
        normalization: str = "sum",
    ):
        if method not in METHODS:
            raise UserError(f"method is {method!r}; use one of {', '.join(METHODS)}")
        if normalization not in NORMALIZATIONS:
            raise UserError(
                f"normalization is {normalization!r}; use one of {', '.join(NORMALIZATIONS)}"
            )
        if normalization == "calibrated" and method == "channel":
            raise UserError(
                "calibrated scores compare an option with and without the input; channel scores "
                "are probabilities of the input: use sum or mean"
            )
        self.scorer, self.encoder = scorer, encoder
        self.method, self.normalization = method, normalization
        self.num_alike = 0  # examples with different options that are the same to the model

    def rank(self, examples: Sequence[EvaluationExample], *, progress=None) -> list[Ranking]:
        """Scores and predictions, in the order of the examples."""
        pairs, counts = self.pairs(examples)
        scores = self.scorer.score(pairs, progress=progress)
        if self.normalization == "mean":
            scores = [score / len(pair.target) for score, pair in zip(scores, pairs, strict=True)]
        elif self.normalization == "calibrated":
            # The targets are the same, and counted already where they were cut.
            sources = self.sources([without_input(example) for example in examples])
            empty = [Pair(s, pair.target) for s, pair in zip(sources, pairs, strict=True)]
            reference = self.scorer.score(empty)
            scores = [score - other for score, other in zip(scores, reference, strict=True)]
        rankings, end = [], 0
        for count in counts:
            mine = scores[end : end + count]
            rankings.append(Ranking(mine, mine.index(max(mine))))
            end += count
        return rankings

    def pairs(self, examples: Sequence[EvaluationExample]) -> tuple[list[Pair], list[int]]:
        """The pairs of all options of all examples, and how many each example has."""
        sources, targets = self.sources(examples), self.targets(examples)
        pairs = [Pair(s, t) for s, t in zip(sources, targets, strict=True)]
        counts = [len(example.choices) for example in examples]
        ends = itertools.accumulate(counts)
        self.num_alike = sum(
            len(set(pairs[end - count : end])) < example.num_distinct_choices
            for example, count, end in zip(examples, counts, ends, strict=True)
        )
        return pairs, counts

    def sources(self, examples: Sequence[EvaluationExample]) -> list[tuple[int, ...]]:
        """What the encoder reads, one per option of each example."""
        asked = [(example, choice) for example in examples for choice in example.choices]
        if self.method == "direct":
            return self.encode_once([e.input for e, _ in asked], self.encoder.sources)
        if self.method == "channel":
            return self.encode_once([choice for _, choice in asked], self.encoder.sources)
        texts = [encoder_text(e.flipped_input, choice) for e, choice in asked]
        return self.encode_once(texts, self.encoder.labelled_sources)

    def targets(self, examples: Sequence[EvaluationExample]) -> list[tuple[int, ...]]:
        """Whose probability is asked, one per option of each example."""
        asked = [(example, choice) for example in examples for choice in example.choices]
        if self.method == "direct":
            texts = [choice for _, choice in asked]
        elif self.method == "channel":
            texts = [example.input for example, _ in asked]
        else:
            texts = [example.instruction for example, _ in asked]
        return self.encode_once(texts, self.encoder.targets)

    @staticmethod
    def encode_once(texts: Sequence[str], encode) -> list[tuple[int, ...]]:
        """``encode`` of every text, called for distinct ones."""
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, map(tuple, encode(distinct)), strict=True))
        return [ids[text] for text in texts]


def without_input(example: EvaluationExample) -> EvaluationExample:
    """The example with nothing to read, for calibration."""
    return dataclasses.replace(example, input="", flipped_input="")
