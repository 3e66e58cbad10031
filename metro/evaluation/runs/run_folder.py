"""Writes a run folder (its form is at the top of ``results.py``) so that no crash can spoil it.

The scores of a prompt are complete in their file before its line enters ``results.jsonl``, and
both files appear by renaming: what is listed is whole; what was interrupted is done again.
"""

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metro.evaluation.runs.results import PromptResult, read_results
from metro.utils.files import write_json, write_text
from metro.utils.messages import UserError

# What has to be the same for a run to go on, weights last: another dtype changes them too. Versions
# may change.
IDENTITY = (
    "model", "method", "suite", "suite_content", "protocol", "options", "sources", "weights"
)  # fmt: skip
ADDED = ("suite_content", "sources")
"""Of IDENTITY, what runs of earlier versions may not have; it is not compared then."""


class RunFolder:
    """A run folder being written.

    Args:
        folder: is made if it is not there; one of the same run goes on.
        info: for ``run.json``.

    Raises:
        ValueError: the folder holds another run, or something else.
    """

    def __init__(self, folder: Path, info: dict[str, Any]):
        self.folder = Path(folder)
        path = self.folder / "run.json"
        if path.is_file():
            self.check_same(path, info)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} is not empty and has no run.json: it is no run; choose another "
                "folder with --out or --run-name"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.rglob("*.tmp"):  # of a process that was killed
            left.unlink()
        write_json(path, info)
        self.results = list(read_results(self.folder / "results.jsonl"))

    def check_same(self, path: Path, info: dict[str, Any]) -> None:
        """Refuse to mix the results of two runs."""
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{path} is corrupt; delete {self.folder} and start again") from None
        now = json.loads(json.dumps(info))
        for name in IDENTITY:
            old, new = before.get(name), now[name]
            if old == new or (name in ADDED and name not in before):
                continue
            if name == "suite_content":
                raise UserError(
                    f"{self.folder} holds a run of suite {now['suite']} with other tasks or "
                    "prompts: its file was changed or moved since; give another --run-name, or "
                    "--overwrite"
                )
            if name == "weights":
                raise UserError(
                    f"{self.folder} holds a run of other weights of {now['model']}: it was trained "
                    "on or replaced since; give another --run-name, or --overwrite"
                )
            if isinstance(old, dict) and isinstance(new, dict):
                name, old, new = next(
                    (f"{name}: {key}", old.get(key), new.get(key))
                    for key in {**old, **new}
                    if old.get(key) != new.get(key)
                )
            raise UserError(
                f"{self.folder} holds a run with {name} {old!r}, this one has {new!r}; give "
                "the same options to go on, another --run-name, or --overwrite"
            )

    def is_done(self, task: str, prompt: str) -> bool:
        return any((r.task, r.prompt) == (task, prompt) for r in self.results)

    def scores_file(self, task: str, prompt: str) -> str:
        """Where the scores of a prompt go, relative to the folder; names may hold anything."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", prompt).strip("-")[:60]
        mark = f"{zlib.crc32(prompt.encode()):08x}"
        return f"scores/{re.sub(r'[^A-Za-z0-9_.-]+', '_', task)}/{slug}-{mark}.jsonl"

    def write(
        self, result: PromptResult, scores: Iterable[dict[str, Any]], extra: dict[str, Any]
    ) -> None:
        """Add a finished prompt. ``extra`` are further fields of its line."""
        path = self.folder / result.scores_file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(score) + "\n" for score in scores))
        listed = self.folder / "results.jsonl"
        before = listed.read_text(encoding="utf-8") if listed.is_file() else ""
        line = json.dumps({**asdict(result), **extra}, ensure_ascii=False)
        write_text(listed, f"{before}{line}\n")
        self.results.append(result)
