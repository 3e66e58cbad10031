"""BIG-bench tasks (Srivastava et al., 2022) as FLIPPED evaluates them, from their ``task.json``.

    direct   prefix, input prefix, input, (choice prefix, option) ..., output prefix
    flipped  the same with prefixes as instruction: one sentinel each, the choice prefix's repeated

Truth is the first option with score 1. The description of a task is not used. One task writes
``append_choices_to_input: "false"``, a text: as published, that is false for flipped and true for
direct and channel.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metro.data.datasets import DatasetUnavailable
from metro.data.prompts.instruction import join_instruction
from metro.evaluation.tasks.examples import EvaluationExample
from metro.utils.messages import UserError


class BigBenchTask(NamedTuple):
    """What shapes the prompts of a task, and its examples."""

    task_prefix: str
    example_input_prefix: str
    example_output_prefix: str
    choice_prefix: str
    append_choices_to_input: Any
    examples: list[dict]


def read_task(folder: Path) -> BigBenchTask:
    """The task of a folder: ``task.json``, else the only other JSON or jsonl file there.

    The latter holds examples in the form of ``task.json`` or of BIG-Bench Hard.

    Raises:
        DatasetUnavailable: there is none.
        ValueError: the file has no multiple-choice examples.
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
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content = {"examples": [json.loads(line) for line in text.splitlines() if line.strip()]}
        else:
            content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return parse_task(content, path)


def parse_task(content: dict, path: Path | str = "task.json") -> BigBenchTask:
    """See :func:`read_task`."""
    found = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise UserError(
            f"{path} has no examples; a task with subtasks keeps them in <subtask>/task.json"
        )
    examples = [scored(example) for example in found]
    without = [i for i, example in enumerate(examples) if not has_choices(example)]
    if without:
        raise UserError(
            f"{path}: example {without[0]} has no multiple-choice targets (target_scores of "
            f"options that are not empty, one with score 1), nor have {len(without) - 1} others; "
            "only multiple-choice tasks can be evaluated by ranking options"
        )
    without = [i for i, example in enumerate(examples) if "input" not in example]
    if without:
        raise UserError(f"{path}: example {without[0]} has no 'input', the text that is asked")
    return BigBenchTask(
        content.get("task_prefix", ""),
        content.get("example_input_prefix", "\nQ: "),
        content.get("example_output_prefix", "\nA: "),
        content.get("choice_prefix", "\n choice: "),
        content.get("append_choices_to_input", True),
        examples,
    )


def has_choices(example: Any) -> bool:
    scores = example.get("target_scores") if isinstance(example, dict) else None
    return isinstance(scores, dict) and 1 in scores.values() and all(map(str.strip, scores))


def scored(example: Any) -> Any:
    """BIG-Bench Hard lists the options behind the input; such an example in BIG-bench's form."""
    if not isinstance(example, dict) or "target_scores" in example or "target" not in example:
        return example
    text, mark, options = str(example.get("input", "")).rpartition("\nOptions:\n")
    names = [line.removeprefix("- ").strip() for line in options.splitlines() if line.strip()]
    if not mark or example["target"] not in names:
        return example
    return {
        "input": text,
        "target_scores": {name: int(name == example["target"]) for name in names},
    }


def make_examples(
    task: BigBenchTask, *, flipped: bool = False, first_index: int = 0
) -> Iterator[EvaluationExample]:
    """The examples of a task, ready to be scored; ``first_index`` keeps subtasks apart."""
    for number, example in enumerate(task.examples):
        scores = example["target_scores"]
        options = list(scores)
        label = list(scores.values()).index(1)
        text, target = str(example["input"]), {}
        if flipped:
            target = dict(
                zip(("flipped_input", "instruction"), flip(task, text, options), strict=True)
            )
        prompt = direct_prompt(task, text, options)
        yield EvaluationExample(first_index + number, prompt, options, label, **target)


def direct_prompt(task: BigBenchTask, text: str, options: list[str]) -> str:
    """What DIRECT reads, and CHANNEL writes."""
    shown = "".join(task.choice_prefix + option for option in options)
    return (
        task.task_prefix
        + task.example_input_prefix
        + text
        + (shown if task.append_choices_to_input else "")
        + task.example_output_prefix
    )


def flip(task: BigBenchTask, text: str, options: list[str]) -> tuple[str, str]:
    """Input instance and instruction for FLIPPED."""
    pieces: list[str] = []
    parts: list[str] = []

    def instruct(piece: str, before: Sequence[str] = ("",)) -> None:
        """One sentinel for a piece, in front of every text; an empty piece needs none."""
        sentinel = f"<extra_id_{len(pieces)}>" if piece else ""
        pieces.extend([piece] if piece else [])
        parts.extend(sentinel + text for text in before)

    instruct(task.task_prefix)
    instruct(task.example_input_prefix, [text])
    if task.append_choices_to_input is True:
        instruct(task.choice_prefix, options)
    instruct(task.example_output_prefix)
    return "".join(parts), join_instruction(pieces)
