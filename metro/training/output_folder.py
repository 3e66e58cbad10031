"""Output folder of a training run: where to resume, what it began with, when it is complete.

It holds ``checkpoint-N`` (to resume from), ``runs`` (TensorBoard), a YAML file of the settings,
``inputs.json`` (digests of what is trained on) and at the end the model itself, or its adapter:
``config.json`` or ``adapter_config.json`` there means that the run is complete. The model is made
in ``.model.partial``, whose ``checksums.json`` lists the Trainer's state, too, once all is there;
killed while the files are moved out of it, the next run moves the rest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

import yaml

from metro.models.source import ADAPTER_CONFIG
from metro.sharding import SHARDS
from metro.utils.checksums import RECORD, check_archive, record, recorded, refuse_damage
from metro.utils.files import link, read_json, read_yaml, write_json, write_text
from metro.utils.locks import INSIDE
from metro.utils.messages import UserError
from metro.utils.settings import Settings

if TYPE_CHECKING:
    from transformers import TrainerState

INPUTS = "inputs.json"
TRAINER_STATE, PARTIAL_MODEL = "trainer_state.json", ".model.partial"
LAST_FILES = "config.json", ADAPTER_CONFIG
"""Of a model and of an adapter: moved last, so that the others are there where it is."""


class TrainingResult(NamedTuple):
    """Result of `metro.pretrain` and `metro.finetune`."""

    folder: Path
    """The finished model."""
    num_updates: int
    """Updates of all runs together that led to it."""
    metrics: dict[str, float]
    """Last logged value of each metric."""


def last_metrics(log_history: list[dict[str, float]]) -> dict[str, float]:
    """Return the last logged value of each metric."""
    metrics: dict[str, float] = {}
    for line in log_history:
        metrics |= {name: value for name, value in line.items() if name != "step"}
    return metrics


def complete_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoint-N folders that were written to the end, by N."""
    found = {}
    for path in out.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / TRAINER_STATE).is_file():  # which the Trainer writes last
            found[int(number[1])] = path
    return [found[number] for number in sorted(found)]


def ran_out_of_patience(callbacks: dict, patience: int | None) -> bool:
    """Tell whether a training ended early.

    Args:
        callbacks: ``stateful_callbacks`` of the Trainer's state, where `Patience` leaves a note.
        patience: evaluations without a better one that end it; None: it never does.
    """
    note = callbacks.get("Patience")
    if patience is None or note is None:
        return False
    return note["attributes"]["early_stopping_patience_counter"] >= patience


def check_checkpoint(folder: Path) -> None:
    """Refuse a damaged checkpoint-N.

    Raises:
        UserError: names the file.
    """
    remedy = f"delete {folder} to resume from the checkpoint before it, or to start again"
    for part in (folder, folder / SHARDS):
        refuse_damage(part, remedy=remedy, most_bytes=None)
    for path in sorted(folder.glob("rng_state_*.pth")):  # which each process writes for itself
        try:
            check_archive(path)
        except BadZipFile as error:
            raise UserError(f"{path} was damaged ({error}): {remedy}") from None


@dataclass(frozen=True)
class RunFolder:
    """The output folder of one command's runs."""

    out: Path
    command: str
    """Such as ``metro finetune``, for messages."""
    may_change: frozenset[str]
    """Settings that do not affect what was trained so far: a resumed run may have others."""

    @property
    def settings_file(self) -> Path:
        return self.out / f"{self.command.split()[-1]}.yaml"

    def state(self) -> dict | None:
        """Return the Trainer's state at the end of a complete run; None where there is none."""
        state = read_json(self.out / TRAINER_STATE)
        if state is None or not self.has_model:
            return None
        refuse_damage(self.out, remedy="copy it again, or train into another --output-dir")
        return state

    def result(self, num_updates: int, log_history: list[dict[str, float]]) -> TrainingResult:
        """Describe the finished model."""
        return TrainingResult(self.out, num_updates, last_metrics(log_history))

    @property
    def has_model(self) -> bool:
        """Whether a model or an adapter is complete there."""
        return any((self.out / name).is_file() for name in LAST_FILES)

    def open(self, settings: Settings, resume: str, is_main_process: bool) -> str | None:
        """Make the folder and note the settings there.

        Args:
            settings: of the run.
            resume: ``auto``, ``never`` or a checkpoint-N folder.
            is_main_process: writes the settings.

        Returns:
            The checkpoint to resume from, None for a fresh start.

        Raises:
            UserError: it holds something else, a run with other settings, or with ``never`` any
                run.
        """
        if resume not in ("auto", "never"):
            if not (Path(resume) / TRAINER_STATE).is_file():
                raise UserError(
                    f"resume is {resume!r}, which is not a complete checkpoint-N folder of "
                    f"{self.command}; use auto, never or such a folder"
                )
            check_checkpoint(Path(resume))
            return resume
        out, earlier = self.out, self.settings_file
        if is_main_process and TRAINER_STATE in recorded(out / PARTIAL_MODEL):
            self._move()
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        if not earlier.is_file() and names - {INSIDE}:
            raise UserError(
                f"{out} is not empty and not of {self.command}; choose another --output-dir"
            )
        checkpoints = complete_checkpoints(out)
        if resume == "never" and (checkpoints or self.has_model):
            raise UserError(
                f"{out} holds a run already; choose another --output-dir, remove it, or leave "
                "--resume never out"
            )
        if checkpoints or (out / TRAINER_STATE).is_file():
            self._refuse_other_settings(settings)
        if is_main_process and checkpoints:
            check_checkpoint(checkpoints[-1])
        out.mkdir(parents=True, exist_ok=True)
        if is_main_process:
            write_text(earlier, yaml.safe_dump(settings.as_dict(), sort_keys=False))
        return str(checkpoints[-1]) if checkpoints else None

    def _refuse_other_settings(self, settings: Settings) -> None:
        before, now = read_yaml(self.settings_file), settings.as_dict()
        if not isinstance(before, dict):
            raise UserError(
                f"{self.settings_file} does not hold the settings of the run there; choose another "
                "--output-dir"
            )
        for part in fields(settings):  # options that are newer than the run
            if part.default is not MISSING:
                before.setdefault(part.name, part.default)
        changed = [
            f"{name} was {before.get(name)!r} and is {now[name]!r}"
            for name in now
            if name not in self.may_change and before.get(name, now[name]) != now[name]
        ]
        if changed:
            raise UserError(
                f"{self.settings_file} is of a run with other settings: {'; '.join(changed)}. Use "
                "the same ones to continue it, or another --output-dir"
            )

    def check_inputs(self, inputs: Mapping[str, str], places: Mapping[str, str]) -> None:
        """Refuse to continue a run, or to call it finished, on another model or other data.

        Args:
            inputs: digests of the model's parts and of the data.
            places: where each of them is, for the message.

        Raises:
            UserError: one differs from what the run in the folder began with.
        """
        out = self.out
        before = read_json(out / INPUTS)
        begun = complete_checkpoints(out) or (out / TRAINER_STATE).is_file()
        for name, now in inputs.items() if isinstance(before, dict) and begun else ():
            if before.get(name) != now:
                raise UserError(
                    f"{out} holds a run on other {name} of {places[name]}: changed or replaced "
                    "since; use another --output-dir"
                )
        write_json(out / INPUTS, dict(inputs), seal=True)

    def take(self, partial: Path, state: TrainerState) -> None:
        """Move the finished model or adapter from ``partial`` into the folder, with the state."""
        state.save_to_json(str(partial / TRAINER_STATE))
        names = {path.name for path in partial.iterdir() if path.is_file()}
        record(partial, names - {"README.md"})
        self._move()

    def _move(self) -> None:
        """Move a whole model to its place; without one of ``LAST_FILES`` the folder is not one."""
        partial = self.out / PARTIAL_MODEL
        names = sorted(path.name for path in partial.iterdir() if path.name != RECORD)
        if {*names} & {*LAST_FILES}:  # else all were moved
            for name in LAST_FILES:
                (self.out / name).unlink(missing_ok=True)
            link(partial / RECORD, self.out / RECORD)
            for name in sorted(names, key=LAST_FILES.__contains__):
                os.replace(partial / name, self.out / name)
        shutil.rmtree(partial)

    def new_partial(self) -> Path:
        """Return where the finished model is written first, which does not exist."""
        partial = self.out / PARTIAL_MODEL
        shutil.rmtree(partial, ignore_errors=True)
        return partial
