"""Rows of local files of the usual kinds, and the splits that a folder has.

==========================================  =======================================================
``.jsonl``, ``.ndjson``, ``.json``          `JsonlRows`, which says why
``.csv``, ``.tsv``, ``.parquet``,           the package ``datasets``, which keeps the rows in Arrow
``.arrow``, folders of ``save_to_disk``     files, so that memory does not grow with their number
``.gz`` of a file above                     unpacked into METRO's cache, by its content
==========================================  =======================================================

csv has no types. A column is read as numbers where every cell is written as Python writes one, and
as lists where every cell is JSON of a list; else it is text, just as it is written (``NA``, too).
"""

import csv
import gzip
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from metro.data.jsonl_rows import JsonlRows, with_names
from metro.utils.characters import refuse_utf16
from metro.utils.checksums import RECORDS
from metro.utils.files import cache_folder, new_file
from metro.utils.identity import files_identity
from metro.utils.messages import MissingPackage, UserError, shortened

JSON_KINDS = (".jsonl", ".ndjson", ".json")
KINDS = (*JSON_KINDS, ".csv", ".tsv", ".parquet", ".arrow")
READABLE = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .gz of these, folders of save_to_disk"
VALIDATION = ("validation", "valid", "val", "dev")
"""Names of one split, in the order in which they are looked for."""
_SPLIT_WORDS = ("train", "training", "test", "eval", "heldout", "challenge", *VALIDATION)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?$")
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", *RECORDS)
_MARKS = {".csv": ",", ".tsv": "\t"}
_MMLU_COLUMNS = ["question", "A", "B", "C", "D", "answer"]
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})?$"
_NUMBER = r"^(-?(0|[1-9][0-9]{0,14})(\.([0-9]{0,13}[1-9]|0))?)?$"
_TRUTH = r"^(True|False)?$"
_LIST = r"^([\[{][\s\S]*[\]}])?$"


def kind_of(path: Path) -> str | None:
    """Return the ending of a readable file without ``.gz``, ``""`` of a saved folder."""
    if path.is_dir():
        return "" if (path / "state.json").is_file() else None
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    return ending if ending in KINDS and path.name not in _NO_ROWS else None


def splits_in(folder: Path) -> dict[str, list[Path]]:
    """Find the splits of a folder: name -> its file, its shards or its saved folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind = kind_of(path)
        if kind is not None and not path.name.startswith("."):
            name = path.name.removesuffix(".gz")
            name = _SHARD.sub("", name[: len(name) - len(kind)])
            found.setdefault(name, []).append(path)
    return found


def find_split(splits: Mapping[str, list[Path]], name: str) -> str | None:
    """Find a split by its name, or by another name of the validation split."""
    names = (name, *VALIDATION) if name in VALIDATION else (name,)
    return next((each for each in names if each in splits), None)


def is_split_name(name: str) -> bool:
    """Tell whether a file's name is that of a split: ``train``, ``dev_r1``, ``test-hard``."""
    return re.split(r"[-_.]", name.lower())[0] in _SPLIT_WORDS


def describe(folder: Path) -> str:
    """Say what a folder holds, for messages on data that are not there."""
    if not folder.is_dir():
        return "there is no such folder"
    names = [
        f"{path.name} (a loading script, which is never run)" if path.suffix == ".py" else path.name
        for path in sorted(folder.iterdir())
    ]
    return f"there is {shortened(names)}" if names else "it is empty"


def open_rows(
    paths: Path | Sequence[Path],
    limit: int | None = None,
    rename: Mapping[str, str] | None = None,
    derive: Mapping[str, dict] | None = None,
    texts: Sequence[str] = (),
) -> Sequence[dict]:
    """Open the rows of a file, of shards, or of a folder of ``save_to_disk``.

    Args:
        paths: the file or folder, or the shards in their order.
        limit: number of rows to keep, from the first.
        rename, derive: see :func:`~metro.data.jsonl_rows.with_names`.
        texts: columns of csv that are text although all their cells are numbers.

    Raises:
        UserError: a file is of another kind or damaged, or there are two for one split.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    if len(paths) > 1 and not all(
        _SHARD.search(path.name.removesuffix(".gz").removesuffix(kind_of(path) or ""))
        for path in paths
    ):
        names = ", ".join(path.name for path in paths)
        raise UserError(f"{paths[0].parent} has several files for one split ({names}): keep one")
    kinds = {kind_of(path) for path in paths}
    if None in kinds or len(kinds) > 1:
        raise UserError(f"{paths[0]} cannot be read as rows: rows come from {READABLE}")
    kind = kinds.pop()
    if kind in JSON_KINDS:
        if len(paths) > 1:
            raise UserError(f"{paths[0].parent} has shards of {kind}: join them to one file (cat)")
        return JsonlRows(unpacked(paths[0]), limit, rename, derive)
    table, converters = _read_tables(kind or "", paths, texts)
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    return TableRows(table, rename or {}, derive or {}, converters)


class TableRows(Sequence):
    """Rows of a table of the package ``datasets``, with the templates' field names.

    Args:
        rows: a ``datasets.Dataset``.
        rename, derive: see :func:`~metro.data.jsonl_rows.with_names`.
        converters: column -> what makes its value of the text in the table.
    """

    def __init__(
        self,
        rows: Any,
        rename: Mapping[str, str],
        derive: Mapping[str, dict],
        converters: Mapping[str, Callable[[str], Any]] | None = None,
    ):
        self.rows, self.rename, self.derive = rows, rename, derive
        self.converters = converters or {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            columns = self.rows[index]
            return [
                self.finished(dict(zip(columns, values, strict=True)))
                for values in zip(*columns.values(), strict=True)
            ]
        return self.finished(self.rows[index])

    def finished(self, row: dict) -> dict:
        """Convert, rename and derive fields, in place."""
        for name, convert in self.converters.items():
            row[name] = convert(row[name]) if row[name] else None
        return with_names(row, self.rename, self.derive)


def unpacked(path: Path) -> Path:
    """Return the file, or what a ``.gz`` holds, unpacked once into METRO's cache.

    Raises:
        UserError: it is not a complete gzip file.
    """
    if path.suffix != ".gz":
        return path
    target = cache_folder() / "unpacked" / files_identity([path]) / path.stem
    if not target.is_file():
        try:
            with (
                new_file(target, overwrite=True) as temporary,
                gzip.open(path) as packed,
                temporary.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is not a complete gzip file ({error}): get it anew") from None
    return target


def _read_tables(kind: str, paths: list[Path], texts: Sequence[str]) -> tuple[Any, dict]:
    """Read files, or a saved folder (no kind), with the package ``datasets``."""
    try:
        import datasets
    except ImportError:
        raise MissingPackage(f"reading {paths[0]}", "datasets", "train") from None
    files = [unpacked(path) for path in paths]
    had_bars = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if kind == "":
            table = datasets.Dataset.load_from_disk(str(files[0]))
        elif kind in (".csv", ".tsv"):
            columns, has_header = _csv_columns(files[0], kind)
            given: dict[str, Any] = {
                "files": tuple(map(str, files)),
                "columns": tuple(columns),
                "has_header": has_header,
                "mark": _MARKS[kind],
                "digest": files_identity(files),
            }
            if not any(_csv_rows(**given)):
                raise UserError(f"{paths[0]} has no rows")
            features = datasets.Features({name: datasets.Value("string") for name in columns})
            table = datasets.Dataset.from_generator(_csv_rows, features=features, gen_kwargs=given)
        else:
            table = datasets.load_dataset(
                kind[1:],
                name=files_identity(files),  # its cache knows a local file by name and time alone
                data_files=[str(path) for path in files],
                split="train",
            )
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        reason = " ".join(str(cause).split())[:300]
        raise UserError(
            f"{paths[0]} cannot be read as {kind or 'a folder of save_to_disk'} "
            f"({type(cause).__name__}: {reason}): write it again"
        ) from None
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    converters = _converters(table, paths[0], texts) if kind in (".csv", ".tsv") else {}
    return table, converters


def _csv_columns(path: Path, kind: str) -> tuple[list[str], bool]:
    """Return the names of a csv file's columns, and whether its first line has them.

    MMLU's own files have none: question, four answer choices and the letter of the right one.
    """
    refuse_utf16(path)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = next(csv.reader(file, delimiter=_MARKS[kind]), [])
    if len(first) == len(_MMLU_COLUMNS) and first[-1].strip() in ("A", "B", "C", "D"):
        return _MMLU_COLUMNS, False
    names = [name.strip() or f"column {number}" for number, name in enumerate(first, start=1)]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"{path} has no names of columns in its first line, or one twice: {first}")
    return names, True


def _csv_rows(
    files: tuple[str, ...], columns: tuple[str, ...], has_header: bool, mark: str, digest: str
) -> Iterator[dict[str, str]]:
    """Yield the rows of csv as text; ``digest`` of the content is there for the cache alone."""
    csv.field_size_limit(1 << 30)
    for path in files:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=mark, strict=True)
            try:
                for number, cells in enumerate(reader):
                    if not cells or (has_header and number == 0):
                        continue
                    if len(cells) != len(columns):
                        raise UserError(
                            f"{path}, line {reader.line_num} has {len(cells)} cells and not "
                            f"{len(columns)}: is a text with {mark!r} or a quote not quoted?"
                        )
                    yield dict(zip(columns, cells, strict=True))
            except csv.Error as error:
                raise UserError(
                    f"{path}, line {reader.line_num} is not csv ({error}): quote its texts"
                ) from None
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 ({error}): write it again") from None


def _converters(table: Any, path: Path, texts: Sequence[str]) -> dict[str, Callable[[str], Any]]:
    """Find the columns of csv that are numbers, truth values or lists throughout."""
    import pyarrow.compute as pc

    found: dict[str, Callable[[str], Any]] = {}
    for name in table.column_names:
        column = table.data.column(name)
        if name in texts or pc.all(pc.equal(column, "")).as_py() is not False:
            continue
        kinds: tuple[tuple[str, Callable[[str], Any]], ...] = (
            (_INTEGER, int),
            (_NUMBER, float),
            (_TRUTH, "True".__eq__),
            (_LIST, json.loads),
        )
        for pattern, convert in kinds:
            if pc.all(pc.match_substring_regex(column, pattern)).as_py():
                found[name] = convert
                break
        if found.get(name) is json.loads:
            for cell in chain.from_iterable(chunk.to_pylist() for chunk in column.chunks):
                try:
                    json.loads(cell or "[]")
                except ValueError:
                    raise UserError(
                        f"{path}: the column {name!r} has lists that are not JSON ({cell[:60]!r}), "
                        "as csv cannot hold lists: use jsonl or parquet"
                    ) from None
    return found
