"""What a model reads and is asked for: one prompted example under each of the three objectives."""

from collections.abc import Iterator
from typing import NamedTuple

from metro.data.datasets import available_splits, load_rows, name_of
from metro.data.prompts.examples import Problem, RenderingSettings, make_example
from metro.data.prompts.instruction import encoder_text
from metro.data.prompts.templates import PromptTemplate
from metro.utils.messages import UserError

OBJECTIVES = ("direct", "channel", "flipped")


class Refused(NamedTuple):
    """A row that gives no example of a template."""

    prompt_name: str
    row: int
    reason: str


def view_example(example: dict, objective: str) -> dict:
    """The example with what encoder and decoder get: for training, and for every option.

    ========  ==============================  =======================
    .         encoder                         decoder
    ========  ==============================  =======================
    direct    prompt                          answer (every option)
    channel   answer (every option)           prompt
    flipped   input and option (every option)  instruction
    ========  ==============================  =======================

    ``encoder_texts`` and ``decoder_texts`` stand in the order of the options, so that the pair at
    ``label`` is the training pair; without options they hold the training pair alone.

    Raises:
        ValueError: FLIPPED has nothing to work with in this example; the message says what.
    """
    options = example["answer_choices"]
    answers = [example["target"]] if options is None else options
    if objective == "direct":
        encoder, decoder = [example["input"]] * len(answers), answers
    elif objective == "channel":
        encoder, decoder = answers, [example["input"]] * len(answers)
    else:
        if options is None:
            raise UserError("has no answer choices, which FLIPPED needs")
        if example["flipped_input"] is None:
            raise UserError("has no instruction, or an answer that is not among its choices")
        encoder = [encoder_text(example["flipped_input"], option) for option in options]
        decoder = [example["instruction"]] * len(options)
    return {**example, "objective": objective, "encoder_texts": encoder, "decoder_texts": decoder}


def default_split(dataset: str, subset: str | None, data_dir=None) -> str:
    """The first validation split, else the first split at all."""
    found = available_splits(dataset, subset, data_dir=data_dir)
    held_out = [split for split in found if not split.startswith("train")]
    return (held_out or found)[0]


def view_rows(
    templates: list[PromptTemplate],
    *,
    split: str | None = None,
    data_dir=None,
    limit: int | None = None,
    objective: str = "direct",
    instruction_text: str = "published",
    seed: int = 0,
) -> Iterator[dict | Refused]:
    """Every row of a split under every template (all of one dataset)."""
    if objective not in OBJECTIVES:
        raise UserError(f"--objective is {objective!r}, and must be one of {', '.join(OBJECTIVES)}")
    dataset, subset = templates[0].dataset, templates[0].subset
    split = split or default_split(dataset, subset, data_dir)
    rows = load_rows(dataset, subset, split, data_dir=data_dir, limit=limit)
    if not len(rows):
        raise UserError(f"split {split!r} of {name_of(dataset, subset)} has no rows")
    settings = RenderingSettings(seed, False, False, instruction_text)
    for template in templates:
        for number in range(len(rows)):
            try:
                example = make_example(template, rows[number], number, split, settings)
                yield view_example(example, objective)
            except Problem as problem:
                reason = ": ".join(filter(None, (problem.reason, problem.detail)))
                yield Refused(template.name, number, reason)
            except ValueError as error:
                yield Refused(template.name, number, str(error))
