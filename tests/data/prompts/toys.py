"""Small invented datasets and templates for the tests of prompt preparation."""

import json
import random
from pathlib import Path

from metro.data.prompts.prepare import prepare_prompts
from tests.data.prepared import Said

TEMPLATE = """  {key}: !Template
    answer_choices: {choices}
    jinja: {jinja}
    metadata: !TemplateMetadata
      metrics: [Accuracy]
      original_task: true
    name: {name}
"""
YES_NO = {
    "ask": ("No ||| Yes", "{{text}} Good? ||| {{answer_choices[label]}}"),
    "random order": (
        "No ||| Yes",
        "{{ ['Well', 'So', 'Now'] | choice }}: {{text}} {{ ['a', 'b'] | choice }} ||| "
        "{{answer_choices[label]}}",
    ),
    "copy": (None, "Repeat: {{text}} ||| {{text}}"),
}


def write_templates(root: Path, dataset: str, templates: dict, subset: str | None = None) -> None:
    folder = root / dataset / (subset or "")
    folder.mkdir(parents=True, exist_ok=True)
    text = f"dataset: {dataset}\n" + (f"subset: {subset}\n" if subset else "") + "templates:\n"
    for key, (name, (choices, jinja)) in enumerate(templates.items()):
        text += TEMPLATE.format(
            key=key, name=name, choices=json.dumps(choices), jinja=json.dumps(jinja)
        )
    (folder / "templates.yaml").write_text(text)


def write_rows(data: Path, dataset: str, split: str, rows: list, subset: str = "default") -> Path:
    file = data / dataset / subset / f"{split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))
    return file


def random_rows(seed: int, count: int) -> list[dict]:
    rng = random.Random(seed)
    words = ["ein", "zwei", "drei", "vier", "fünf", "a|||b", "x\n y"]
    return [
        {"text": " ".join(rng.choices(words, k=rng.randint(1, 30))), "label": rng.randint(0, 1)}
        for _ in range(count)
    ]


def make_world(root: Path, num_rows: int = 300) -> Path:
    """Two datasets with train and validation rows, templates, and a mixture of both."""
    for seed, (dataset, subset) in enumerate((("one", None), ("two", "sub"))):
        write_templates(root / "templates", dataset, YES_NO, subset)
        for split, count in (("train", num_rows), ("validation", 40)):
            rows = random_rows(seed, count)
            write_rows(root / "data", dataset, split, rows, subset or "default")
    (root / "mix.yaml").write_text("datasets: [one, two/sub]\ncap: 100\n")
    return root


def prepare(world: Path, out: Path, **options):
    """With defaults that make a test quick, and what the user was told."""
    progress = Said()
    options = {
        "mixture": world / "mix.yaml",
        "templates": world / "templates",
        "data_dir": world / "data",
        "num_workers": 1,
        "progress": progress,
        **options,
    }
    return prepare_prompts(out=out, **options), progress.lines


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of an output; of the manifest all but the places of its inputs."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = json.loads(found.pop("prompts.json"))
    for name in ("settings", "crc32"):  # the latter is the checksum of the former, too
        manifest.pop(name)
    return {**found, "prompts.json": json.dumps(manifest).encode()}
