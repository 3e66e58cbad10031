"""BIG-bench tasks (Srivastava et al., 2022) as FLIPPED evaluates them, from their ``task.json``.

    direct   prefix, input prefix, input, (choice prefix, choice) ..., output prefix
    flipped  the same with prefixes as instruction: one sentinel each, the choice prefix's repeated

The truth is the first choice with score 1. The description of a task is not used. One task writes
``append_choices_to_input: "false"``, a text: as published, that is false for flipped and true for
direct and channel.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metro.data.datasets import DatasetUnavailable
from metro.data.jsonl_rows import JsonlRows, UnusableRow
from metro.data.prompts.instruction import join_instruction
from metro.data.prompts.labels import NO_LABEL
from metro.evaluation.tasks.examples import EvaluationExample
from metro.utils.messages import UserError

_CHOICE = re.compile(r"\s*(\([A-Z]\)|-) *(.*)")
_TEXTS = {
    "task_prefix": "",
    "example_input_prefix": "\nQ: ",
    "example_output_prefix": "\nA: ",
    "choice_prefix": "\n choice: ",
}


class BigBenchFile(NamedTuple):
    """A task file: examples, and the texts around them."""

    task_prefix: str
    example_input_prefix: str
    example_output_prefix: str
    choice_prefix: str
    append_choices_to_input: Any
    examples: list


def read_task_file(folder: Path) -> BigBenchFile:
    """Read the task of a folder: ``task.json``, else the only other JSON or jsonl file there.

    The latter holds examples in the form of ``task.json`` or of BIG-Bench Hard.

    Raises:
        DatasetUnavailable: there is none.
        UserError: the file has no multiple-choice examples.
    """
    path = folder / "task.json"
    if not path.is_file():
        others = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
        if len(others) != 1:
            raise DatasetUnavailable(
                f"{path} is missing: copy it there from BIG-bench's benchmark_tasks/"
                f"{folder.name}, or give the folder of tasks with --bigbench-dir DIR"
            )
        path = others[0]
    try:
        if path.suffix == ".jsonl":
            content = {"examples": list(_lines(JsonlRows(path)))}
        else:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return parse_task(content, path)


def _lines(rows: JsonlRows) -> Iterator[dict | UnusableRow]:
    """Yield the examples of a file of lines; in the place of a broken one, what is wrong there."""
    for number in range(len(rows)):
        try:
            yield rows[number]
        except UnusableRow as error:
            yield error


def parse_task(content: dict, path: Path | str = "task.json") -> BigBenchFile:
    """Check the content of a task file, and bring it into one form.

    Raises:
        UserError: it has no multiple-choice examples; the message names ``path``.
    """
    found = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise UserError(
            f"{path} has no examples; a task with subtasks keeps them in <subtask>/task.json"
        )
    answers = _two_answers(found)
    examples = [_scored(example, answers) for example in found]
    if not any(isinstance(x, dict) and isinstance(x.get("target_scores"), dict) for x in examples):
        raise UserError(
            f"{path} has no multiple-choice examples (target_scores of choices); only "
            "multiple-choice tasks can be evaluated by ranking choices"
        )
    texts = {name: content.get(name, default) for name, default in _TEXTS.items()}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: {name} is {text!r}, and must be a text")
    return BigBenchFile(
        **texts,
        append_choices_to_input=content.get("append_choices_to_input", True),
        examples=examples,
    )


def _scored(example: Any, answers: list[str]) -> Any:
    """Convert an example of BIG-Bench Hard to BIG-bench's form.

    Its input lists the choices behind ``Options:``, as ``- Yes`` or as ``(A) the text``, whose
    target is ``(A)``: the text is the choice then. Where no example of the file lists any,
    ``answers`` are the choices.
    """
    if not isinstance(example, dict) or "target_scores" in example:
        return example
    question, target = example.get("input"), example.get("target")
    if not (isinstance(question, str) and isinstance(target, str)):
        return example
    text, _, listed = question.rpartition("\nOptions:\n")
    found: list[list[str]] = []  # letter and choice
    for line in listed.split("\n") if text else ():
        begins = _CHOICE.match(line)
        if begins or not found:
            found.append([*begins.groups()] if begins else ["-", line])
        else:  # of a choice of several lines
            found[-1][1] += f"\n{line}"
    named = [(letter, choice.strip()) for letter, choice in found if choice.strip()]
    choices = {choice if letter == "-" else letter: choice for letter, choice in named}
    if not text:
        text, choices = question, {answer: answer for answer in answers}
    target = choices.get(target.strip(), target.strip())  # some targets are the text itself
    scores = {choice: int(choice == target) for choice in choices.values()}
    if scores and not any(scores.values()):
        return UnusableRow("answer not among the choices", f"{target!r} is not in {list(scores)}")
    return {"input": text, "target_scores": scores} if scores else example


def _two_answers(examples: list) -> list[str]:
    """Return the two targets of a file of yes-or-no questions, which lists no choices.

    A tenth of the examples may be damaged; their targets are more rare than both of these.
    """
    targets = (example.get("target") for example in examples if isinstance(example, dict))
    counts = Counter(target.strip() for target in targets if isinstance(target, str))
    found = counts.most_common(3)
    num_bad = len(examples) - sum(count for _, count in found[:2])
    if len(found) < 2 or len(examples) < 3 or 10 * num_bad > len(examples):
        return []
    is_clear = len(found) == 2 or found[2][1] < found[1][1]
    return sorted(target for target, _ in found[:2]) if is_clear else []


def make_question(
    task: BigBenchFile, number: int, index: int, *, flipped: bool = False
) -> EvaluationExample:
    """Make the question of an example; ``index`` keeps the subtasks of a task apart.

    Raises:
        UnusableRow: it has no input, no target scores of choices, or no score is 1.
    """
    example = task.examples[number]
    if isinstance(example, UnusableRow):
        raise example
    if not isinstance(example, dict) or not isinstance(example.get("target_scores"), dict):
        raise UnusableRow("no multiple-choice targets", "the example has no target_scores")
    if not isinstance(example.get("input"), str | int | float):
        raise UnusableRow("missing field", "the example has no text 'input'")
    scores, text = example["target_scores"], str(example["input"])
    if not text.strip():
        raise UnusableRow("empty input")
    if 1 not in scores.values():
        raise UnusableRow(NO_LABEL, f"no choice has score 1: {scores}")
    choices, label = list(scores), list(scores.values()).index(1)
    flipped_input, instruction = flip_example(task, text, choices) if flipped else (None, None)
    prompt = direct_prompt(task, text, choices)
    return EvaluationExample(index, prompt, choices, label, flipped_input, instruction)


def direct_prompt(task: BigBenchFile, text: str, choices: list[str]) -> str:
    """Write the prompt of DIRECT, which is CHANNEL's target."""
    shown = "".join(task.choice_prefix + choice for choice in choices)
    return (
        task.task_prefix
        + task.example_input_prefix
        + text
        + (shown if task.append_choices_to_input else "")
        + task.example_output_prefix
    )


def flip_example(task: BigBenchFile, text: str, choices: list[str]) -> tuple[str, str]:
    """Write input instance and instruction for FLIPPED."""
    pieces: list[str] = []
    parts: list[str] = []

    def instruct(piece: str, before: Sequence[str] = ("",)) -> None:
        """Put one sentinel for a piece in front of every text; an empty piece needs none."""
        sentinel = f"<extra_id_{len(pieces)}>" if piece else ""
        pieces.extend([piece] if piece else [])
        parts.extend(sentinel + text for text in before)

    instruct(task.task_prefix)
    instruct(task.example_input_prefix, [text])
    if task.append_choices_to_input is True:
        instruct(task.choice_prefix, choices)
    instruct(task.example_output_prefix)
    return "".join(parts), join_instruction(pieces)
