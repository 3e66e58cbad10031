"""Rows of the datasets that prompts are made of: from a local folder or from the hub.

Local: ``<dir>/<dataset>/<subset or default>/<split>.jsonl`` or another kind of `local_files`, with
the field names of the templates or of the hub's version. Hub: the table ``datasets.yaml`` states
where each dataset is today, and the package ``datasets`` loads it; no loading script is ever run.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from metro.data.jsonl_rows import with_names
from metro.data.local_files import (
    READABLE,
    TableRows,
    describe,
    find_split,
    is_split_name,
    open_rows,
    splits_in,
)
from metro.utils.files import inside, read_yaml
from metro.utils.messages import MissingPackage, UserError, shortened
from metro.utils.network import hub_address, use_cache_alone, use_cache_without_network

_TABLE = Path(__file__).with_name("datasets.yaml")
SPLITS = ("train", "validation", "test")
_PARQUET_COPY = "refs/convert/parquet"


LOCAL_ROWS = "give local rows with --data-dir DIR"


class DatasetUnavailable(UserError):
    """A dataset is not available here; the message says what to do about it.

    Attributes:
        problem: the message without the option that prepared and evaluated datasets have for it.
        remedy: that option; empty where the problem says what to do.
    """

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(": ".join(filter(None, (problem, remedy))))
        self.problem, self.remedy = problem, remedy


class DatasetEntry(NamedTuple):
    """An entry of ``datasets.yaml``, whose comment explains the fields."""

    hub: str | None = None
    config: str | None = None
    splits: tuple[str, ...] = ()
    script: bool = False
    rename: dict[str, str] = {}
    derive: dict[str, dict] = {}
    texts: tuple[str, ...] = ()
    manual: str | None = None
    trap: str | None = None
    unsure: bool = False


def name_of(dataset: str, subset: str | None) -> str:
    """Join dataset and subset: ``glue/mrpc``."""
    return f"{dataset}/{subset}" if subset else dataset


@lru_cache(maxsize=1)
def dataset_table() -> dict[str, DatasetEntry]:
    """Read ``datasets.yaml``: dataset or dataset/subset -> entry."""
    return {
        name: DatasetEntry(
            **{
                **fields,
                "splits": tuple(fields.get("splits", ())),
                "texts": tuple(fields.get("texts", ())),
            }
        )
        for name, fields in read_yaml(_TABLE).items()
    }


def load_rows(
    dataset: str,
    subset: str | None,
    split: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
) -> Sequence[dict]:
    """Open the rows of a split; each is read when it is accessed.

    Args:
        dataset: name in the templates.
        subset: name in the templates, if the dataset has any.
        split: such as ``train``.
        data_dir: folder of local datasets; the hub is not used then.
        limit: number of rows to keep, from the first.

    Raises:
        DatasetUnavailable: the dataset or the split is not available.
    """
    if data_dir is not None:
        entry = dataset_table().get(name_of(dataset, subset)) or DatasetEntry()
        files = local_files(data_dir, dataset, subset, split)
        return open_rows(files, limit, entry.rename, entry.derive, entry.texts)
    rows, entry = _open_on_hub(dataset, subset, split, streaming=False)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return TableRows(rows, entry.rename, entry.derive)


def available_splits(
    dataset: str, subset: str | None, *, data_dir: str | Path | None = None
) -> list[str]:
    """List the splits that can be used, in the table's order.

    If the table has the dataset, only its splits count, else files that are called like a split
    (a folder may hold others, see :func:`stray_files`).

    Raises:
        DatasetUnavailable: the dataset is not available.
    """
    name = name_of(dataset, subset)
    entry = dataset_table().get(name)
    if data_dir is not None:
        found, folder = _local_splits(Path(data_dir), dataset, subset)
        if entry and entry.splits:
            usable = [split for split in entry.splits if find_split(found, split)]
        else:
            usable = [split for split in sorted(found) if is_split_name(split)]
        if not usable:
            wanted = ", ".join(entry.splits if entry and entry.splits else SPLITS)
            raise DatasetUnavailable(
                f"{folder} has none of the splits {wanted} of {name}: it has "
                f"{shortened(sorted(found))}"
            )
        return usable
    if entry and entry.splits:
        _refuse_manual(name, entry)
        return list(entry.splits)
    hub = _datasets_package(name)
    try:
        return list(hub.get_dataset_split_names(dataset, subset))
    except hub_errors(hub) as error:
        raise _unavailable(name, dataset, [error]) from None


def local_files(data_dir: str | Path, dataset: str, subset: str | None, split: str) -> list[Path]:
    """Find the files of a split: one, its shards, or the folder that ``save_to_disk`` made.

    Raises:
        DatasetUnavailable: there is none.
    """
    splits, folder = _local_splits(Path(data_dir), dataset, subset)
    found = find_split(splits, split)
    if dataset == "mmlu" and found == "dev" != split:
        found = None  # the five rows that MMLU has for few-shot prompts
    if found is None:
        raise DatasetUnavailable(
            f"{name_of(dataset, subset)} has no split {split!r} in {folder}: it has "
            f"{shortened(sorted(splits))}"
        )
    return splits[found]


def stray_files(data_dir: str | Path, dataset: str, subset: str | None) -> list[Path]:
    """List the files beside a dataset's splits that nothing reads.

    Raises:
        DatasetUnavailable: the dataset is not there.
    """
    splits, folder = _local_splits(Path(data_dir), dataset, subset)
    entry = dataset_table().get(name_of(dataset, subset)) or DatasetEntry()
    known = [paths for name, paths in splits.items() if name in entry.splits or is_split_name(name)]
    quiet = (".", "readme", "license", "dataset_", "state.json")  # what comes with data
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.lower().startswith(quiet)
        if not any(path in paths for paths in known)
    ]


def _local_splits(
    data_dir: Path, dataset: str, subset: str | None
) -> tuple[dict[str, list[Path]], Path]:
    """Find a dataset's splits, and the folder they are in.

    It is named by the subset, ``default`` or the hub's configuration; without a subset it may be
    the dataset's own folder, as ``save_to_disk`` makes it, or ``data`` in there, as on the hub.
    """
    if not data_dir.is_dir():
        raise DatasetUnavailable(f"--data-dir {data_dir} is not a folder")
    root, entry = inside(data_dir, dataset), dataset_table().get(name_of(dataset, subset))
    config = [entry.config] if entry and entry.config else []
    names = [subset] if subset else ["default", *config, "", "data"]
    for name in names:
        folder = inside(root, name) if name else root
        if splits := splits_in(folder):
            return splits, folder
    if not subset and root.is_dir():
        others = [path for path in root.iterdir() if path.is_dir() and splits_in(path)]
        if len(others) == 1:
            return splits_in(others[0]), others[0]
    if dataset == "mmlu" and subset and (found := _mmlu_splits(data_dir, subset)):
        return found
    place = f"{dataset}/{names[0]}"
    folder = next((place for place in (root / names[0], root) if place.is_dir()), root)
    raise DatasetUnavailable(
        f"{name_of(dataset, subset)} is not in {data_dir} ({describe(folder)} in {folder}): write "
        f"its rows as {place}/<split>.jsonl there (or {READABLE.removeprefix('.jsonl, ')}), or "
        "leave --data-dir out to take it from the hub"
    )


def _mmlu_splits(data_dir: Path, subject: str) -> tuple[dict[str, list[Path]], Path] | None:
    """Find a subject in the layout of MMLU's own archive: ``test/<subject>_test.csv``."""
    for root in (data_dir, data_dir / "data", data_dir / "mmlu", data_dir / "mmlu" / "data"):
        files = {split: root / split / f"{subject}_{split}.csv" for split in ("dev", "val", "test")}
        if found := {split: [path] for split, path in files.items() if path.is_file()}:
            return found, root
    return None


def peek(dataset: str, subset: str | None, split: str, count: int) -> tuple[list[dict], int]:
    """Read the first rows of a split on the hub and its size, without downloading all of it.

    Returns:
        The first ``count`` rows, and the number of rows.

    Raises:
        DatasetUnavailable: the dataset or the split is not available.
    """
    rows, entry = _open_on_hub(dataset, subset, split, streaming=True)
    splits = rows.info.splits or {}
    try:
        taken = list(rows.take(count))
    except hub_errors(_datasets_package(name_of(dataset, subset))) as error:
        raise _unavailable(
            name_of(dataset, subset), entry.hub or dataset, [error], entry.unsure
        ) from None
    first = [with_names(dict(row), entry.rename, entry.derive) for row in taken]
    if split in splits and splits[split].num_examples:
        return first, splits[split].num_examples
    return first, len(load_rows(dataset, subset, split))  # the size is not stated: download


def _open_on_hub(dataset: str, subset: str | None, split: str, streaming: bool):
    """Load a split with the package ``datasets``, from the first revision that works."""
    name = name_of(dataset, subset)
    entry = dataset_table().get(name) or DatasetEntry(hub=dataset, config=subset)
    _refuse_manual(name, entry)
    if entry.splits and split not in entry.splits:
        raise DatasetUnavailable(
            f"{name} has no split {split!r} with labels: it has {', '.join(entry.splits)}"
            + (f" ({entry.trap})" if entry.trap else "")
        )
    repository = entry.hub or dataset
    hub = _datasets_package(name)
    main = [(entry.config, None), (None, None)]
    copies = [(entry.config, _PARQUET_COPY), ("default", _PARQUET_COPY)]
    errors: list[Exception] = []
    for config, revision in copies + main if entry.script else main + copies[:1]:
        try:
            rows = hub.load_dataset(
                repository, name=config, revision=revision, split=split, streaming=streaming
            )
            return rows, entry
        except hub_errors(hub) as error:
            errors.append(error)
            if isinstance(error, ConnectionError):
                break
    raise _unavailable(name, repository, errors, entry.unsure)


def hub_errors(hub) -> tuple[type[Exception], ...]:
    """Errors of the package ``datasets`` for a repository that it cannot load."""
    return (hub.exceptions.DatasetsError, OSError, ValueError, RuntimeError)


def _refuse_manual(name: str, entry: DatasetEntry) -> None:
    if entry.manual:
        raise DatasetUnavailable(
            f"{name} cannot be downloaded: {entry.manual}", "then give that folder as --data-dir"
        )


def _datasets_package(name: str):
    """Import the package ``datasets``, which uses its cache where there is no network."""
    try:
        import datasets
    except ImportError:
        error = MissingPackage(f"taking {name} from the hub", "datasets", "train")
        raise DatasetUnavailable(str(error), f"or {LOCAL_ROWS}") from None
    use_cache_without_network()
    return datasets


def _unavailable(
    name: str, repository: str, errors: list[Exception], unsure: bool = False
) -> DatasetUnavailable:
    doubt = " (an address that could not be verified)" if unsure else ""
    if any(isinstance(error, ConnectionError) for error in errors):
        use_cache_alone()  # every attempt takes half a minute, and a mixture has dozens of datasets
        return DatasetUnavailable(
            f"{name} is not in the cache{doubt}, and the hub {hub_address()} cannot be reached",
            LOCAL_ROWS,
        )
    reasons = [" ".join(f"{type(error).__name__}: {error}".split()) for error in errors]
    reasons = [reason if len(reason) <= 200 else f"{reason[:197]}..." for reason in reasons]
    return DatasetUnavailable(
        f"{name} could not be loaded from {repository}{doubt}: {'; '.join(dict.fromkeys(reasons))}",
        f"without a network, {LOCAL_ROWS}",
    )
