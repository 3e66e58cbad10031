"""Writes run folders by hand, for tests of what reads them: summary and report."""

import json
from pathlib import Path

from metro.evaluation.runs.published import PublishedRow

PROMPTS = {
    "rte": {f"prompt {i}": 0.5 + 0.02 * i for i in range(10)},  # mean 0.59
    "cb": {"a": 0.40, "b": 0.45, "c": 0.56},  # mean 0.47
}
PUBLISHED = [
    PublishedRow("metro_t0_base", "METRO-T0-Base", "t0", "card", {"rte": 0.6162, "cb": 0.5274}),
    PublishedRow("metro_t0_base", "METRO-T0-Base", "t0", "paper", {"rte": 0.6518, "cb": 0.4560}),
    PublishedRow("t0_3b", "T0-3B", "t0", "paper", {"rte": 0.6455}),
    PublishedRow("t0_3b", "T0-3B", "bigbench", "paper", {"winowhy": 0.6455}),
]
TITLES = {"metro_t0_base": "METRO-T0-Base"}


def write_run(
    folder: Path,
    accuracies: dict[str, dict[str, float | list[bool]]],
    *,
    model: str = "some/model",
    suite: str = "t0",
    method: str = "direct",
    registered: str | None = None,
    listed: dict[str, list[str]] | None = None,
    options: dict | None = None,
    title: str | None = None,
    chance: float = 0.5,
    num_examples: int = 20,
) -> Path:
    """A run folder in the form at the top of metro/evaluation/runs/run_folder.py.

    Args:
        accuracies: task -> prompt -> a fraction (no score file then), or whether each example was
            right (with a score file).
        listed: what the suite lists; what there is if it is not given.
    """
    folder.mkdir(parents=True)
    lines = []
    for task, prompts in accuracies.items():
        for number, (prompt, right) in enumerate(prompts.items()):
            line = {"suite": suite, "task": task, "prompt": prompt, "method": method}
            line |= {"chance": chance, "median_choices": round(1 / chance), "seconds": 0.5}
            if isinstance(right, list):
                scores = folder / "scores" / task / f"{number}.jsonl"
                scores.parent.mkdir(parents=True, exist_ok=True)
                row = {"scores": [], "label": 1}
                rows = [{"index": i, **row, "prediction": int(r)} for i, r in enumerate(right)]
                scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
                line |= {"num_examples": len(right), "accuracy": sum(right) / len(right)}
                line["scores_file"] = str(scores.relative_to(folder))
            else:
                line |= {"num_examples": num_examples, "accuracy": right, "scores_file": None}
            line["macro_f1"] = line["accuracy"] / 2
            lines.append(json.dumps(line))
    (folder / "results.jsonl").write_text("".join(line + "\n" for line in lines))
    info = {
        "model": model,
        "method": method,
        "suite": suite,
        "title": title,
        "registered": registered,
        "protocol": {"max_source_length": 512},
        "options": options or {},
        "versions": {"metro": "0.1.0"},
        "tasks": listed or {task: list(prompts) for task, prompts in accuracies.items()},
    }
    (folder / "run.json").write_text(json.dumps(info))
    return folder
