"""Published rows out of the registry of released checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from metro.models.registry import RegisteredModel, registered_model, registered_models
from metro.utils.messages import UserError

SAME = 0.0002  # two sources agree where they round differently; fraction


@dataclass(frozen=True)
class PublishedRow:
    """A published line of numbers."""

    model: str
    """Name in the registry."""
    title: str
    suite: str
    source: str
    values: dict[str, float]
    """Fraction of every task."""
    method: str = ""
    """How it was evaluated; empty where any method may be compared with it."""


def published_rows(selection: Sequence[str] = ("all",)) -> list[PublishedRow]:
    """Rows in the order of the registry, the one that a checkpoint is compared with first.

    Args:
        selection: ``all``, ``none``, or names of registered models (hub ids too).
    """
    names = [name for item in selection for name in item.split(",") if name]
    if "none" in names or "all" in names:
        if len(names) > 1:
            raise UserError(f"--published {' '.join(names)}: all and none stand alone")
        models = list(registered_models().values()) if names == ["all"] else []
    else:
        found = [registered_model(name) for name in names]
        models = list({model.name: model for model in found}.values())
    return [row for model in models for row in rows_of(model)]


def rows_of(model: RegisteredModel) -> list[PublishedRow]:
    """Published rows of a model, the first of a suite being what it is compared with."""
    return merge_agreeing(
        [
            PublishedRow(
                model.name,
                model.title,
                table["suite"],
                table["source"],
                {task: accuracy / 100 for task, accuracy in table["results"].items()},
                model.method,
            )
            for table in model.published
        ]
    )


def merge_agreeing(rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    """Rows of one model without those that another row of the suite repeats.

    A card often holds a part of a paper's table. The fuller one is kept then, at the place of the
    first, with both sources: a checkpoint is compared with everything that is known of it.
    """
    kept: list[PublishedRow] = []
    for row in rows:
        for place, other in enumerate(kept):
            fewer, more = sorted((row, other), key=lambda each: len(each.values))
            if row.suite == other.suite and is_part(fewer, more):
                kept[place] = replace(more, source=f"{other.source}; {row.source}")
                break
        else:
            kept.append(row)
    return kept


def is_part(fewer: PublishedRow, more: PublishedRow) -> bool:
    return all(
        task in more.values and abs(value - more.values[task]) <= SAME
        for task, value in fewer.values.items()
    )
