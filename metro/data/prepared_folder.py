"""The output folder of ``prepare-text``: its state during the work, and how it is completed.

Work goes into ``OUT.partial`` beside ``OUT``, with ``state.json`` saying how far it is. The
manifest is the last file written there; then the folder takes its final name. So ``OUT`` is
complete or not there.
"""

import os
import shutil
import time
import zlib
from pathlib import Path

from metro.utils.files import read_json, write_json
from metro.utils.messages import UserError

MANIFEST = "prepare_text.json"
STATE = "state.json"
LOCK = "lock"
LOCK_SECONDS = 5.0


class PreparedFolder:
    """``OUT`` and its ``OUT.partial``, for one set of settings."""

    manifest_name = MANIFEST
    command = "metro prepare-text"

    def __init__(self, out: Path, settings: dict):
        self.out, self.settings = Path(out).resolve(), settings
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._lock = None

    def finished_manifest(self, overwrite: bool) -> dict | None:
        """The manifest of an output that is complete and was made with these settings.

        Raises:
            ValueError: files of it are missing or changed, or it was made with other settings;
                with ``overwrite`` the answer is None then.
        """
        manifest = read_json(self.out / self.manifest_name)
        for name, facts in (manifest or {}).get("files", {}).items():
            path = self.out / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                if overwrite:
                    return None
                raise UserError(
                    f"{path} is missing or was changed after `{self.command}` wrote it: "
                    "prepare the folder again with --overwrite"
                )
        if manifest and manifest["settings"] != self.settings:
            if overwrite:
                return None
            raise UserError(
                f"{self.out} is finished and was made with other settings: "
                f"{describe_differences(manifest['settings'], self.settings)}. "
                "Choose another --out, or replace it with --overwrite"
            )
        return manifest

    def open(self, overwrite: bool) -> dict | None:
        """Lock the work folder; return the state of an interrupted run, if any.

        Raises:
            ValueError: an unfinished run with other settings or inputs lies there, or another
                process works on it.
            FileExistsError: one of the two folders holds something else.
        """
        state = read_json(self.partial / STATE)
        manifest = read_json(self.partial / self.manifest_name)
        earlier = (manifest or state or {}).get("settings")
        if not earlier and not overwrite and self.out.exists():
            if not self.out.is_dir() or any(self.out.iterdir()):
                raise FileExistsError(f"{self.out} exists and is not empty: choose another --out")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if earlier and earlier != self.settings:
            if not overwrite:
                raise UserError(
                    f"{self.partial} holds an unfinished run that differs: "
                    f"{describe_differences(earlier, self.settings)}. Run with the earlier "
                    "settings to continue it, or add --overwrite to begin again"
                )
            state = manifest = earlier = None
        if not earlier:
            self._clear_partial()
        return manifest or state

    def save_state(self, state: dict) -> None:
        write_json(self.partial / STATE, {**state, "settings": self.settings})

    def discard(self) -> None:
        """Leave nothing behind of a run that cannot succeed."""
        self._clear_partial()
        (self.partial / LOCK).unlink(missing_ok=True)
        self.partial.rmdir()

    def complete(self, manifest: dict | None = None) -> dict:
        """Write the manifest (or find it written) and give the folder its final name."""
        path = self.partial / self.manifest_name
        if manifest is None:
            manifest = read_json(path)
        else:
            files = sorted(
                file
                for file in self.partial.iterdir()
                if file.suffix in (".bin", ".idx", ".txt", ".model")
            )
            facts = {
                file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files
            }
            manifest = {"settings": self.settings, **manifest, "files": facts}
            write_json(path, manifest)
        for file in self.partial.iterdir():
            if file.name not in manifest["files"] and file != path:
                file.unlink()
        # Moved onto nothing or onto an empty folder in one step, ...
        if not self.out.exists() or not any(self.out.iterdir()):
            try:
                os.rename(self.partial, self.out)
                return manifest
            except OSError:  # for instance a mount point
                self.out.mkdir(exist_ok=True)
        # ... and otherwise file by file, the manifest removed first and put back last.
        (self.out / MANIFEST).unlink(missing_ok=True)
        for split in ("train", "valid"):
            for suffix in (".bin", ".idx"):
                if split + suffix not in manifest["files"]:
                    (self.out / (split + suffix)).unlink(missing_ok=True)
        for name in [*manifest["files"], MANIFEST]:
            if (self.partial / name).exists():
                shutil.move(self.partial / name, self.out / name)
        self.partial.rmdir()
        return manifest

    def _clear_partial(self) -> None:
        """Delete what an earlier run left, and nothing that is not ours."""
        ours = {MANIFEST, STATE, LOCK, MANIFEST + ".tmp", STATE + ".tmp", "dict.txt", "sp.model"}
        ours |= {
            split + suffix for split in ("train", "valid") for suffix in (".bin", ".idx", ".sizes")
        }
        if foreign := sorted(path.name for path in self.partial.iterdir() if path.name not in ours):
            raise FileExistsError(
                f"{self.partial} is needed as a work folder and holds other files "
                f"({', '.join(foreign)}): "
                "move them away or choose another --out"
            )
        for path in self.partial.iterdir():
            if path.name != LOCK:
                path.unlink()

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        self._lock = (self.partial / LOCK).open("w")
        # Workers of a killed run hold its lock until they notice that they are alone.
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is preparing {self.out} now: wait for it or end it"
                    ) from None
            time.sleep(0.1)


def describe_differences(earlier: dict, now: dict) -> str:
    """Settings that differ, old and new value, for people."""
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


def _crc32(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"
