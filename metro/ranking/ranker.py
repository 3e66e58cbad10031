"""`metro.Ranker`: a model that chooses a label for each text.

Probabilities are those of the options among each other: exp(score) as a share of the options' sum,
where the score is that of `metro evaluate` for the same prompt. With several templates they are
averaged, and the agreement says how many templates choose the label by themselves.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metro.data.jsonl_rows import UnusableRow
from metro.evaluation.model import open_model
from metro.evaluation.scoring.pair_scoring import PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier, Ranking, check_distinct
from metro.evaluation.tasks.examples import EvaluationExample
from metro.models.loading import LoadedModel
from metro.processes import join_processes
from metro.ranking.questions import Asked, Questions
from metro.ranking.settings import RankSettings

Row = str | Mapping[str, Any]


class Ranked(NamedTuple):
    """The label chosen for a text."""

    text: str | None
    """None where several fields are read, and none is said to hold it."""
    label: str | None
    """The most probable option; None where the row cannot be ranked."""
    probabilities: dict[str, float]
    """Option -> its share, in the order given."""
    log_probabilities: dict[str, float]
    """Option -> its score, the mean over the templates."""
    agreement: float | None = None
    """Share of the templates whose own choice is the label; None with a single template."""
    problem: str | None = None
    """Why the row cannot be ranked."""

    @property
    def probability(self) -> float | None:
        """Of the label."""
        return None if self.label is None else self.probabilities[self.label]


class Ranker:
    """Chooses one of several options for each text.

        classifier = metro.Ranker("metro_t0pp_largepp", options=["complaint", "praise"])
        classifier(["My parcel never came."])[0].label

    Args:
        model: registered name, hub id, Hugging Face folder, adapter, fairseq checkpoint (``.pt``),
            or a model that `metro.load` has loaded.
        options: texts to choose from; without them the template's, or ``options_field`` of a row.
        settings: all options of `RankSettings`, or give them one by one, such as ``template``,
            ``method`` or ``normalization``.

    Raises:
        UserError: a setting is wrong, or there is no such model.
    """

    with_misses = False
    """See `PairScorer`."""

    def __init__(
        self,
        model: str | Path | LoadedModel,
        options: Sequence[str] | None = None,
        *,
        settings: RankSettings | None = None,
        **more: Any,
    ):
        name = model.model.name_or_path if isinstance(model, LoadedModel) else str(model)
        if options is not None:
            more["options"] = list(options)
        self.settings = RankSettings.of(settings, model=name or "model", **more)
        method = self.settings.method_of(self.settings.model)
        self.questions = Questions(self.settings, flipped=method == "flipped")
        self.processes = join_processes(self.settings.device, self.settings.device_map)
        opened = model if isinstance(model, LoadedModel) else name
        self.scored = open_model(opened, self.settings, self.processes.device)
        scorer = PairScorer(
            self.scored.model,
            batch_tokens=self.scored.batch_tokens,
            rank=self.processes.rank,
            num_processes=self.processes.count,
            gather=self.processes.add_up if self.processes.count > 1 else None,
            with_misses=self.with_misses,
        )
        encoder = self.scored.protocol.encoder(self.scored.tokenizer)
        if options := self.questions.options:
            check_distinct(encoder.targets(options), options)
        self.classifier = RankClassifier(
            scorer,
            encoder,
            self.scored.method,
            self.settings.normalization,
        )
        self.window = max(256, self.scored.batch_tokens // 16)
        """Rows that are ranked together."""
        self.num_cut_values = 0
        """Rows with a value that a template cut."""

    def __call__(self, texts: Row | Iterable[Row]) -> "Ranked | list[Ranked]":
        """Rank a text, or several; a text may be a row of fields, which the template reads."""
        if isinstance(texts, str | Mapping):
            return next(self.rank([texts]))
        return list(self.rank(texts))

    def rank(
        self,
        rows: Iterable[Row | UnusableRow],
        *,
        first: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[Ranked]:
        """Rank any number of rows, in their order, some of them at a time.

        Args:
            rows: texts or rows of fields; an error in the place of a row that cannot be read.
            first: number of the first row.
            progress: receives the number of rows ranked so far, with fractions.
        """
        numbered = enumerate(rows, start=first)
        while window := list(itertools.islice(numbered, self.window)):
            yield from self._rank_window(window, progress)

    def _rank_window(
        self,
        window: list[tuple[int, Row | UnusableRow]],
        progress: Callable[[float], None] | None,
    ) -> list[Ranked]:
        asked: list[Asked | Ranked] = []
        prepared: list[list[EvaluationExample]] = []  # of the rows that can be ranked
        for number, row in window:
            try:
                if isinstance(row, UnusableRow):
                    raise row
                found = self.questions.ask(row, number)
                prepared.append([*map(self.scored.protocol.prepare, found.questions)])
                asked.append(found)
            except UnusableRow as error:
                text = row if isinstance(row, str) else None
                asked.append(Ranked(text, None, {}, {}, problem=_reason(error)))
        self.num_cut_values += sum(any(q.is_cut for q in each) for each in prepared)
        rankings = []
        count = len(self.questions.templates)
        for position in range(count):

            def show(share: float, position=position) -> None:
                if progress is not None:
                    progress(window[0][0] + len(window) * (position + share) / count)

            examples = [each[position] for each in prepared]
            rankings.append(self.classifier.rank(examples, progress=show))
        self.classifier.scorer.forget()
        of_rows = zip(*rankings, strict=True)
        return [
            each if isinstance(each, Ranked) else combine(each, next(of_rows)) for each in asked
        ]


def combine(asked: Asked, rankings: Sequence[Ranking]) -> Ranked:
    """Average the rankings of one text under several templates."""
    options = asked.questions[0].choices
    shares = [probabilities_of(ranking.scores) for ranking in rankings]
    probabilities = [math.fsum(each) / len(each) for each in zip(*shares, strict=True)]
    scores = [math.fsum(e) / len(e) for e in zip(*(r.scores for r in rankings), strict=True)]
    # With one template as `metro evaluate`, also where shares round to equal numbers.
    deciding = scores if len(rankings) == 1 else probabilities
    best = deciding.index(max(deciding))
    votes = sum(ranking.prediction == best for ranking in rankings)
    return Ranked(
        asked.text,
        options[best],
        dict(zip(options, probabilities, strict=True)),
        dict(zip(options, scores, strict=True)),
        votes / len(rankings) if len(rankings) > 1 else None,
    )


def probabilities_of(scores: Sequence[float]) -> list[float]:
    """Softmax of log-probabilities."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / math.fsum(weights) for weight in weights]


def _reason(error: UnusableRow) -> str:
    return ": ".join(filter(None, (error.reason, error.detail)))[:300]
