"""Output folder of ``prepare-text`` and ``prepare-prompts``: resumable work, complete results.

Work goes into ``OUT.partial`` beside ``OUT``; ``state.json`` in it records the progress. The
manifest is the last file written there, then the folder takes its final name: ``OUT`` is complete
or absent. With ``overwrite`` the files that an earlier manifest lists are deleted, and binarised
text of a split that the new manifest lacks; all others stay.
"""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from metro.modeling.text_metro_t5 import VOCABULARY_FILES
from metro.utils import checksums
from metro.utils.files import inside, read_json, write_json
from metro.utils.locks import locked
from metro.utils.messages import UserError

TEXT_MANIFEST = "prepare_text.json"
PROMPTS_MANIFEST = "prompts.json"
SPLITS = ("train", "valid")
SHARDS = "[0-9]" * 5 + "-of-" + "[0-9]" * 5
"""Pattern of the folders in a corpus in shards, whose manifest lists them as ``shards``."""
STATE = "state.json"
TEXT_FILES = [split + suffix for split in SPLITS for suffix in (".bin", ".idx")]
_SIZES = ".sizes"  # of files that metro.data.indexed_file needs during the work only


class Prepared(NamedTuple):
    """Result of ``prepare_text`` and ``prepare_prompts``."""

    folder: Path
    """The output."""
    manifest: dict
    """Settings, counts, notes, and size and checksum of every file."""
    was_finished: bool
    """The folder was complete before, and nothing was done."""


class PreparedFolder:
    """``OUT`` and its ``OUT.partial``, for one set of settings.

    Args:
        out: the folder to make.
        settings: JSON content; an earlier run is resumed only if it had the same.
        manifest_name: file with settings, results, and size and checksum of every file.
        command: that makes such folders, for messages.
    """

    def __init__(self, out: Path, settings: dict, manifest_name: str, command: str):
        self.out, self.settings = Path(out).resolve(), settings
        self.manifest_name, self.command = manifest_name, command
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._lock = ExitStack()

    def finished_manifest(self, overwrite: bool) -> dict | None:
        """Return the manifest of a complete output with these settings, None where there is none.

        Raises:
            UserError: files of it are missing or changed, or it was made with other settings;
                with ``overwrite`` the answer is None then.
        """
        manifest = self.read_manifest()
        if manifest is None:
            return None
        problem = None
        for name, facts in manifest["files"].items():
            path = self.out / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                problem = (
                    f"{path} is missing or was changed after `{self.command}` wrote it: "
                    "prepare the folder again with --overwrite"
                )
        if not problem and manifest["settings"] != self.settings:
            problem = (
                f"{self.out} is finished and was made with other settings: "
                f"{describe_differences(manifest['settings'], self.settings)}. "
                "Choose another --out, or replace it with --overwrite"
            )
        if not problem:
            return manifest
        if not overwrite:
            raise UserError(problem)
        return None

    def read_manifest(self) -> dict | None:
        """Return the manifest of a complete output, None where there is none."""
        return self._read(self.out / self.manifest_name)

    def open(self, overwrite: bool) -> dict | None:
        """Lock the output; return the state (or manifest) of an interrupted run, if any.

        Raises:
            UserError: there is an unfinished run with other settings or inputs, another process
                is working on it, or one of the two folders holds something else.
        """
        self._lock.enter_context(locked(self.out))
        earlier = self._read(self.partial / self.manifest_name) or self._read(self.partial / STATE)
        if not earlier and self.out.exists():
            if not self.out.is_dir() or (not overwrite and any(self.out.iterdir())):
                raise UserError(f"{self.out} exists and is not empty: choose another --out")
        self.partial.mkdir(parents=True, exist_ok=True)
        if earlier and earlier["settings"] != self.settings:
            if not overwrite:
                raise UserError(
                    f"{self.partial} holds an unfinished run that differs: "
                    f"{describe_differences(earlier['settings'], self.settings)}. Run with the "
                    "earlier settings to continue it, or add --overwrite to begin again"
                )
            earlier = None
        if not earlier:
            self._clear_partial()
        return earlier

    def save_state(self, state: dict) -> None:
        """Record the progress, in one step."""
        write_json(self.partial / STATE, {**state, "settings": self.settings}, seal=True)

    def copy_vocabulary(self, folder: Path) -> None:
        """Copy ``sp.model`` and ``dict.txt`` into the work folder."""
        for name in VOCABULARY_FILES:
            shutil.copyfile(folder / name, self.partial / name)

    def discard(self) -> None:
        """Remove the work folder of a run that cannot succeed."""
        self._clear_partial()
        self.partial.rmdir()
        self._lock.close()

    def complete(self, manifest: dict | None = None) -> dict:
        """Write the manifest (None: it was written before) and give the folder its final name.

        Returns:
            The manifest with ``settings`` and ``files`` added.
        """
        path = self.partial / self.manifest_name
        if manifest is None:
            manifest = read_json(path)
            assert manifest is not None
        else:
            files = {name: self._facts(name) for name in _files_below(self.partial)}
            files = {name: facts for name, facts in files.items() if facts}
            manifest = {"settings": self.settings, **manifest, "files": files}
            write_json(path, manifest, seal=True)
        for name in _files_below(self.partial):
            if name not in manifest["files"] and name != self.manifest_name:
                (self.partial / name).unlink()
        self._remove_earlier_output(manifest)
        try:
            os.rename(self.partial, self.out)
        except OSError:  # other files are there, or it is a mount point
            for name in [*manifest["files"], self.manifest_name]:
                if (self.partial / name).exists():  # else moved before an interruption
                    (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(self.partial / name, self.out / name)
            shutil.rmtree(self.partial)
        self._lock.close()
        return manifest

    def _read(self, path: Path) -> dict | None:
        """Read a manifest or state, None where there is none."""
        content = read_json(path)
        needed = {"settings"} if path.name == STATE else {"settings", "files"}
        if content is not None and not (
            isinstance(content, dict)
            and all(isinstance(content.get(name), dict) for name in needed)
            and all(
                isinstance(facts, dict) and isinstance(facts.get("bytes"), int)
                for facts in content.get("files", {}).values()
            )
        ):
            raise UserError(
                f"{path} is not what `{self.command}` writes: remove it or choose another --out"
            )
        for name in (content or {}).get("files", ()):
            if not inside(self.out, name).parent.resolve().is_relative_to(self.out):
                raise UserError(f"{path} names {name}, which a link takes out of {self.out}")
        return content

    def _facts(self, name: str) -> dict:
        path = self.partial / name
        if name in (STATE, self.manifest_name) or path.suffix in (_SIZES, ".tmp"):
            return {}
        return checksums.facts(path)

    def _remove_earlier_output(self, manifest: dict) -> None:
        """Delete the files of an earlier run, then its manifest, which lists them.

        A stale split of text is deleted without a manifest too: fairseq would read it.
        """
        earlier = self.out / self.manifest_name
        names = {*(self._read(earlier) or {"files": {}})["files"]}
        if self.manifest_name == TEXT_MANIFEST:
            names |= {*TEXT_FILES} - {*manifest["files"]}
        paths = [self.out / name for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        earlier.unlink(missing_ok=True)
        for folder in sorted({folder for path in paths for folder in path.parents}, reverse=True):
            if self.out in folder.parents and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _clear_partial(self) -> None:
        """Delete what an earlier run left, and nothing that is not ours."""
        ours = {self.manifest_name, STATE, self.manifest_name + ".tmp", STATE + ".tmp"}
        ours |= {*VOCABULARY_FILES, *SPLITS, *TEXT_FILES, *(split + _SIZES for split in SPLITS)}
        if foreign := sorted(path.name for path in self.partial.iterdir() if path.name not in ours):
            raise UserError(
                f"{self.partial} is needed as a work folder and holds other files "
                f"({', '.join(foreign)}): move them away or choose another --out"
            )
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def shard_folders(data: str) -> list[Path]:
    """Return the folders that ``--data`` names, in the order in which the epochs read them.

    Args:
        data: a folder of ``prepare-text``, in shards or not; or several, joined by colons.

    Raises:
        UserError: shards are missing, or do not belong to the others.
    """
    finish = "run the same `metro prepare-text` without --shard"
    found: list[Path] = []
    for folder in (Path(part) for part in data.split(":") if part):
        manifest = read_json(folder / TEXT_MANIFEST) or {}
        if shards := manifest.get("shards"):
            checksums.refuse_damage(folder, remedy=f"{finish} again")
            found += [inside(folder, name) for name in shards]
        elif any(folder.glob(SHARDS)):
            raise UserError(f"the shards in {folder} are not finished or not listed: {finish}")
        else:
            found.append(folder)
    return found


def describe_differences(earlier: dict, now: dict) -> str:
    """Describe the settings that differ, each with its earlier and present value."""
    parts = []
    for key in sorted({*earlier, *now}):
        if earlier.get(key) == now.get(key):
            continue
        if key == "inputs":
            parts.append(f"input {_describe_input_change(earlier.get(key, []), now.get(key, []))}")
        else:
            parts.append(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}")
    return "; ".join(parts)


def _describe_input_change(earlier: list[dict], now: list[dict]) -> str:
    names = [[source["name"] for source in sources] for sources in (earlier, now)]
    if names[0] != names[1]:
        return f"was {names[0]} and is {names[1]}"
    changed = [b["name"] for a, b in zip(earlier, now, strict=True) if a != b]
    return f"changed on disk: {', '.join(changed)}"


def _files_below(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]
