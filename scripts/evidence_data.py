"""Data of scripts/evidence.py: binarised text, and prompts and suites of every dataset."""

import json
from collections.abc import Mapping
from pathlib import Path

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
    fixed = {k: v for k, v in plan.items() if k not in ("about", "limits", "seeds")}
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
        folder = out / "tasks" / name
        if not (folder / "prompts").is_dir():
            prepare_dataset(name, options, data_dir, folder)


def prepare_dataset(name: str, options: Mapping, data_dir: Path, folder: Path) -> None:
    """Write the training rows as prompts, held-out and test rows as suites of one task."""
    parts = {
        split: load_rows(
            options["dataset"], options.get("subset"), options[split], data_dir=data_dir
        )
        for split in ("train", "test")
    }
    train = list(parts["train"])
    rows = {
        "train": [row for number, row in enumerate(train) if number % TUNE_EVERY],
        "tune": train[::TUNE_EVERY],
        "test": list(parts["test"]),
    }
    for part, chosen in rows.items():
        place = folder / "rows" / name / "default" / f"{part}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, "".join(json.dumps(row) + "\n" for row in chosen))
        prompt = {"jinja": options["prompt"], "answer_choices": options["answer_choices"]}
        task = {"data": str(place.resolve()), "prompts": {"plain": prompt}}
        write_text(folder / f"{part}.yaml", json.dumps({"tasks": {name: task}}))
    write_text(folder / "mixture.yaml", json.dumps({"datasets": [name]}))
    template = {key: json.dumps(value) for key, value in prompt.items()}
    (folder / "templates" / name).mkdir(parents=True, exist_ok=True)
    write_text(
        folder / "templates" / name / "templates.yaml",
        f"dataset: {name}\ntemplates:\n  1: !Template\n    name: plain\n"
        f"    jinja: {template['jinja']}\n    answer_choices: {template['answer_choices']}\n"
        "    metadata: !TemplateMetadata\n      original_task: true\n",
    )
    metro.prepare_prompts(
        mixture=str(folder / "mixture.yaml"),
        out=folder / "prompts",
        format="jsonl",
        data_dir=folder / "rows",
        templates=folder / "templates",
        validation="none",
        progress=False,
    )
