"""Rows of the datasets that prompts are made of: from a local folder, or from the hub.

Local: ``<dir>/<dataset>/<subset or default>/<split>.jsonl``, one row per line, with the field names
of the hub's version. Hub: the table ``datasets.yaml`` says where each dataset lives today, and the
package ``datasets`` loads it; no loading script is ever run.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from metro.utils.messages import UserError, install_command

_TABLE = Path(__file__).with_name("datasets.yaml")
_PARQUET_COPY = "refs/convert/parquet"
_BLOCK = 1 << 24
_LONGEST_BLANK = 64


class DatasetUnavailable(UserError):
    """A dataset cannot be had here; the message says what to do about it."""


class UnusableRow(UserError):
    """A row from which an example cannot be made.

    Attributes:
        reason: the kind of failure; equal ones are counted together.
        detail: the value at fault.
    """

    def __init__(self, reason: str, detail: str = "", where: str = ""):
        super().__init__(": ".join(filter(None, (where, reason, detail))))
        self.reason, self.detail = reason, detail


class DatasetEntry(NamedTuple):
    """One line of ``datasets.yaml``."""

    hub: str | None = None
    config: str | None = None
    splits: tuple[str, ...] = ()
    script: bool = False
    rename: dict[str, str] = {}
    derive: dict[str, dict] = {}
    manual: str | None = None
    trap: str | None = None
    unsure: bool = False


def name_of(dataset: str, subset: str | None) -> str:
    return f"{dataset}/{subset}" if subset else dataset


@lru_cache(maxsize=1)
def dataset_table() -> dict[str, DatasetEntry]:
    """``datasets.yaml``: what is known of each dataset."""
    import yaml

    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    entries = {}
    for name, facts in table.items():
        facts["splits"] = tuple(facts.get("splits", ()))
        entries[name] = DatasetEntry(**facts)
    return entries


def load_rows(
    dataset: str,
    subset: str | None,
    split: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
) -> Sequence[dict]:
    """The rows of a split; read when they are asked for.

    Args:
        data_dir: folder of local datasets; nothing is taken from the hub then.
        limit: the first so many rows.

    Raises:
        DatasetUnavailable: the dataset or the split cannot be had.
    """
    if data_dir is not None:
        entry = dataset_table().get(name_of(dataset, subset))
        file = local_file(data_dir, dataset, subset, split)
        return JsonlRows(file, limit, entry.derive if entry else {})
    return _load_from_hub(dataset, subset, split, limit)


def available_splits(
    dataset: str, subset: str | None, *, data_dir: str | Path | None = None
) -> list[str]:
    """The splits that can be used, in the table's order.

    Those of the table where it knows the dataset (a folder may hold other files), otherwise all.

    Raises:
        DatasetUnavailable: the dataset cannot be had.
    """
    entry = dataset_table().get(name_of(dataset, subset))
    if data_dir is not None:
        folder = _local_folder(Path(data_dir), dataset, subset)
        found = sorted(path.stem for path in folder.glob("*.jsonl"))
        wanted = entry.splits if entry and entry.splits else found
        usable = [split for split in wanted if split in found]
        if not usable:
            raise DatasetUnavailable(
                f"{folder} has none of the splits {', '.join(wanted)} of "
                f"{name_of(dataset, subset)}: it has {', '.join(found)}"
            )
        return usable
    if entry and entry.splits:
        _refuse_manual(name_of(dataset, subset), entry)
        return list(entry.splits)
    hub = _datasets_package(name_of(dataset, subset))
    try:
        with _without_waiting(hub):
            return list(hub.get_dataset_split_names(dataset, subset))
    except Exception as error:  # the library raises a dozen kinds; all mean "not that one"
        raise _unavailable(name_of(dataset, subset), dataset, error) from None


def _local_folder(data_dir: Path, dataset: str, subset: str | None) -> Path:
    """The folder of a dataset: named by the subset, ``default``, or the hub's configuration."""
    if not data_dir.is_dir():
        raise DatasetUnavailable(f"--data-dir {data_dir} is not a folder")
    root, entry = data_dir / dataset, dataset_table().get(name_of(dataset, subset))
    names = [subset] if subset else ["default", *([entry.config] if entry and entry.config else [])]
    for name in names:
        if any((root / name).glob("*.jsonl")):
            return root / name
    others = [path.name for path in root.glob("*") if any(path.glob("*.jsonl"))]
    if not subset and len(others) == 1:
        return root / others[0]
    raise DatasetUnavailable(
        f"{name_of(dataset, subset)} is not in {data_dir}: write its rows as "
        f"{root.relative_to(data_dir) / names[0]}/<split>.jsonl there, or leave --data-dir out to "
        "take it from the hub"
    )


def local_file(data_dir: str | Path, dataset: str, subset: str | None, split: str) -> Path:
    """Where the rows of a split are.

    Raises:
        DatasetUnavailable: they are not there.
    """
    folder = _local_folder(Path(data_dir), dataset, subset)
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        found = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl")))
        raise DatasetUnavailable(
            f"{name_of(dataset, subset)} has no split {split!r} in {folder}: it has {found}"
        )
    return file


class JsonlRows(Sequence):
    """The rows of a jsonl file, found through the places where its lines begin.

    Pickled, it is the file's name and those places: a worker opens the file itself. A
    malformed line raises ``UnusableRow`` when it is read, not when the file is opened.
    """

    def __init__(self, path: str | Path, limit: int | None = None, derive: dict | None = None):
        self.path, self.derive = Path(path), derive or {}
        self.offsets = self._find_offsets()
        if limit is not None:
            self.offsets = self.offsets[: max(0, limit) + 1]
        self._file = None

    def _find_offsets(self):
        return _line_starts(self.path)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows and none at {index}")
        index = int(index) % len(self)
        if self._file is None or self._process != os.getpid():  # a forked worker reads on its own
            self._file, self._process = self.path.open("rb"), os.getpid()
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        self._file.seek(start)  # stays in the file's buffer where rows are read in order
        where = f"{self.path}, row {index}"
        try:
            row = json.loads(self._file.read(end - start))
        except ValueError as error:
            raise UnusableRow("unreadable row", f"not JSON: {error}", where) from None
        if not isinstance(row, dict):
            raise UnusableRow("unreadable row", "not a JSON object", where)
        return _with_derived(row, self.derive) if self.derive else row

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def _line_starts(path: Path):
    """Byte offsets of the lines that are not empty, and the end of the file."""
    import numpy as np

    starts, offset = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
            starts.append(offset + ends.astype(np.int64) + 1)
            offset += len(block)
    starts = np.unique(np.concatenate([*starts, np.array([offset])]))
    return _without_blank_lines(path, starts)


def _without_blank_lines(path: Path, starts):
    """A blank line counts to the row before it."""
    import mmap

    import numpy as np

    short = np.flatnonzero(np.diff(starts) < _LONGEST_BLANK)
    if not len(short):
        return starts
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        blank = [i for i in short if content[int(starts[i]) : int(starts[i + 1])].isspace()]
    return np.delete(starts, blank)


class HubRows(Sequence):
    """Rows of a split that the package ``datasets`` holds, under the templates' field names."""

    def __init__(self, rows, entry: DatasetEntry):
        self.rows, self.rename, self.derive = rows, entry.rename, entry.derive

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            columns = self.rows[index]
            names = list(columns)
            return [
                self.with_names(dict(zip(names, values, strict=True)))
                for values in zip(*(columns[name] for name in names), strict=True)
            ]
        return self.with_names(self.rows[index])

    def with_names(self, row: dict) -> dict:
        for name, name_there in self.rename.items():
            if name_there in row and name not in row:
                row[name] = row.pop(name_there)
        return _with_derived(row, self.derive) if self.derive else row


def _with_derived(row: dict, derive: dict[str, dict]) -> dict:
    """Fields that a label's other numbering has in other versions of the templates."""
    for name, rule in derive.items():
        value = row.get(rule["from"])
        if name not in row and isinstance(value, int) and 0 <= value < len(rule["values"]):
            row[name] = rule["values"][value]
    return row


def _load_from_hub(dataset: str, subset: str | None, split: str, limit: int | None) -> HubRows:
    rows, entry = _open_on_hub(dataset, subset, split, streaming=False)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return HubRows(rows, entry)


def peek(dataset: str, subset: str | None, split: str, count: int) -> tuple[list[dict], int]:
    """The first rows of a split on the hub, and how many it has, without downloading it all.

    Raises:
        DatasetUnavailable: the dataset or the split cannot be had.
    """
    rows, entry = _open_on_hub(dataset, subset, split, streaming=True)
    splits = rows.info.splits or {}
    renamed = HubRows([], entry)
    first = [renamed.with_names(dict(row)) for row in rows.take(count)]
    if split in splits and splits[split].num_examples:
        return first, splits[split].num_examples
    return first, len(_load_from_hub(dataset, subset, split, None))  # nowhere written: count


def _open_on_hub(dataset: str, subset: str | None, split: str, streaming: bool):
    """A split as the package ``datasets`` has it, from the first place that works."""
    name = name_of(dataset, subset)
    entry = dataset_table().get(name) or DatasetEntry(hub=dataset, config=subset)
    _refuse_manual(name, entry)
    if entry.splits and split not in entry.splits:
        raise DatasetUnavailable(
            f"{name} has no split {split!r} with labels: it has {', '.join(entry.splits)}"
            + (f" ({entry.trap})" if entry.trap else "")
        )
    hub = _datasets_package(name)
    places = [{"name": entry.config}, {"name": None}]
    copies = [{"name": config, "revision": _PARQUET_COPY} for config in (entry.config, "default")]
    errors = []
    for place in copies + places if entry.script else places + copies[:1]:
        try:
            with _without_waiting(hub):
                rows = hub.load_dataset(entry.hub, split=split, streaming=streaming, **place)
            return rows, entry
        except Exception as error:  # the library raises a dozen kinds; all mean "not that one"
            errors.append(error)
            if isinstance(error, ConnectionError):
                break
    raise _unavailable(name, entry.hub, errors[0], entry.unsure)


_OFFLINE_SECONDS = 300
_unreachable_since = -_OFFLINE_SECONDS - 1.0  # when this process last failed to reach the hub


@contextlib.contextmanager
def _without_waiting(hub) -> Iterator[None]:
    """Once the hub was not reached, look into the local cache alone.

    Every attempt costs half a minute of retries otherwise, and a mixture has dozens of datasets.
    """
    global _unreachable_since
    import huggingface_hub.constants

    places = (hub.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        if time.monotonic() - _unreachable_since < _OFFLINE_SECONDS:
            for place in places:
                place.HF_HUB_OFFLINE = True
            yield
        else:
            try:
                yield
            except ConnectionError:
                _unreachable_since = time.monotonic()
                raise
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _refuse_manual(name: str, entry: DatasetEntry) -> None:
    if entry.manual:
        raise DatasetUnavailable(
            f"{name} cannot be downloaded: {entry.manual}; then give that folder as --data-dir"
        )


def _datasets_package(name: str):
    try:
        import datasets
    except ImportError:
        raise DatasetUnavailable(
            f"{name} would come from the hub, which needs the package datasets: "
            f"{install_command('train')}, or give local rows with --data-dir DIR"
        ) from None
    return datasets


def _unavailable(
    name: str, repository: str, error: Exception, unsure: bool = False
) -> DatasetUnavailable:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    reason = reason if len(reason) <= 200 else reason[:197] + "..."
    doubt = " (an address that could not be verified)" if unsure else ""
    return DatasetUnavailable(
        f"{name} could not be loaded from {repository}{doubt}: {reason}. Without a network, give "
        "local rows with --data-dir DIR"
    )
