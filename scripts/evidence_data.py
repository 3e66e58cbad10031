"""Data of scripts/evidence.py: binarised text, and prompts and suites of every dataset."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import metro
from metro.data.datasets import load_rows
from metro.utils.files import read_json, write_json, write_text
from metro.utils.messages import UserError

TUNE_EVERY = 5
"""Every fifth training row is held out, to choose rates by."""


def prepare(plan: Mapping, text: Path, data_dir: Path, out: Path) -> None:
    """Write ``text`` and ``tasks/DATASET`` into a folder; what is there already stays.

    Raises:
        UserError: the folder was begun with another plan; texts of the page and seeds may differ.
    """
    fixed = {k: v for k, v in plan.items() if k not in ("about", "limits", "reading", "seeds")}
    earlier = read_json(out / "plan.json")
    for name in fixed if earlier is not None else ():
        if earlier.get(name) != fixed[name]:
            raise UserError(
                f"{out} was begun with a plan that has {name} {earlier.get(name)!r}, not "
                f"{fixed[name]!r}: give another --out"
            )
    write_json(out / "plan.json", fixed, indent=1)
    metro.prepare_text(
        inputs=[str(text)],
        out=out / "text",
        train_vocab=plan["vocab_size"],
        valid_fraction=plan["valid_fraction"],
    )
    for name, options in plan["datasets"].items():
        rows = write_rows(name, options, data_dir, out / "rows")
        asked = [Asked(name, [options["prompt"]], options["answer_choices"])]
        for part in ("tune", "test"):
            write_suite(out / "tasks" / name / f"{part}.yaml", asked, rows, part)
        prepare_mixture(asked, out / "rows", out / "tasks" / name)
    if objectives := plan.get("objectives"):
        folder, seen, unseen = out / "tasks" / "objectives", [], []
        for name, options in objectives["datasets"].items():
            for found, choices in ((seen, plan["datasets"][name]), (unseen, options)):
                found.append(Asked.about(name, options["prompts"], choices["answer_choices"]))
        for part, asked in (("tune", seen), ("test", seen), ("unseen", unseen)):
            write_suite(folder / f"{part}.yaml", asked, out / "rows", part)
        prepare_mixture(seen, out / "rows", folder)


class Asked(NamedTuple):
    """A dataset, its prompts in Jinja and its answer choices."""

    dataset: str
    prompts: Sequence[str]
    answer_choices: str

    @classmethod
    def about(cls, dataset: str, prompts: Sequence[str], answer_choices: str) -> Self:
        """Write the answer choices into the prompts where they say ``LABELS``."""
        labels = " or ".join(answer_choices.split(" ||| "))
        return cls(dataset, [each.replace("LABELS", labels) for each in prompts], answer_choices)

    def named(self) -> dict[str, dict]:
        """Name -> prompt, as suites have it."""
        return {
            f"prompt {number}": {"jinja": jinja, "answer_choices": self.answer_choices}
            for number, jinja in enumerate(self.prompts, 1)
        }


def write_rows(name: str, options: Mapping, data_dir: Path, folder: Path) -> Path:
    """Write the rows to train on, held out of them, and to test on."""
    train, test = (
        [*load_rows(options["dataset"], options.get("subset"), options[split], data_dir=data_dir)]
        for split in ("train", "test")
    )
    rows = {
        "train": [row for number, row in enumerate(train) if number % TUNE_EVERY],
        "tune": train[::TUNE_EVERY],
        "test": test,
    }
    for part, chosen in rows.items():
        place = folder / name / "default" / f"{part}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, "".join(json.dumps(row) + "\n" for row in chosen))
    return folder


def write_suite(path: Path, asked: Sequence[Asked], rows: Path, part: str) -> None:
    """Write a suite with a task of each dataset."""
    part = "test" if part == "unseen" else part
    tasks = {
        each.dataset: {
            "data": str((rows / each.dataset / "default" / f"{part}.jsonl").resolve()),
            "prompts": each.named(),
        }
        for each in asked
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"tasks": tasks}))


def prepare_mixture(asked: Sequence[Asked], rows: Path, folder: Path) -> None:
    """Write the training rows as prompts; those that are there already stay."""
    if (folder / "prompts").is_dir():
        return
    write_text(folder / "mixture.yaml", json.dumps({"datasets": [each.dataset for each in asked]}))
    for each in asked:
        place = folder / "templates" / each.dataset / "templates.yaml"
        place.parent.mkdir(parents=True, exist_ok=True)
        templates = "".join(
            f"  {number}: !Template\n    name: {name}\n    jinja: {json.dumps(prompt['jinja'])}\n"
            f"    answer_choices: {json.dumps(prompt['answer_choices'])}\n"
            "    metadata: !TemplateMetadata\n      original_task: true\n"
            for number, (name, prompt) in enumerate(each.named().items())
        )
        write_text(place, f"dataset: {each.dataset}\ntemplates:\n{templates}")
    metro.prepare_prompts(
        mixture=str(folder / "mixture.yaml"),
        out=folder / "prompts",
        format="jsonl",
        data_dir=rows,
        templates=folder / "templates",
        validation="none",
        progress=False,
    )
