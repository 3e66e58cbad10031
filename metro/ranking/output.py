"""Files of ranked rows: written as they are ranked, resumed by row, finished in one step.

While rows are ranked they are appended to a hidden file beside the output: a line of JSON with all
that decides the numbers, then a line per row, with the digest of the row that it was made of, each
with a checksum. A run that was stopped goes on behind the last line before an incomplete or damaged
one, if model, settings and rows are the same.
At the end the file is turned into csv, jsonl or parquet, which appears complete.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Self

from metro.ranking.ranker import Ranked
from metro.utils.files import check_output, naming, new_file, sealed, unsealed
from metro.utils.identity import digest
from metro.utils.locks import locked
from metro.utils.messages import UserError

FORMAT = 2
ROWS_OF_A_PART = 10_000
COLUMNS = ("row", "text", "label", "probability", "agreement", "problem")


class RankedFile:
    """An output in progress; a context, in which no other process writes it.

    Args:
        out: the file to make.
        overwrite: it may exist.
        inputs: files that are read, which are never replaced.

    Raises:
        UserError: the file exists, or another process writes it.
    """

    def __init__(self, out: Path, overwrite: bool, inputs: tuple[Path, ...] = ()):
        self.out, self.overwrite, self.inputs = out, overwrite, inputs
        check_output(out, overwrite, inputs)
        self.partial = out.with_name(f".{out.name}.partial")
        self.num_done = 0
        """Rows that an earlier run has done."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(locked(self.partial))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, identity: Mapping[str, Any]) -> None:
        """Begin, or find what an earlier run has done.

        Args:
            identity: all that decides the numbers, but for the rows.

        Raises:
            UserError: an earlier run had other settings or another model.
        """
        header = json.loads(json.dumps({"format": FORMAT, **identity}))
        end = 0
        if self.partial.is_file():
            with self.partial.open("rb") as file:
                before = _parsed(file.readline())
                if before is not None and not self._is_other(before, header):
                    end = file.tell()
                    for line in file:
                        if _parsed(line) is None:  # the process was killed while it wrote it
                            break
                        self.num_done += 1
                        end += len(line)
        self.file = self.partial.open("ab")
        self._stack.callback(self._close)
        self.file.truncate(end)
        if not end:
            self._append([header])

    def _is_other(self, before: dict[str, Any], now: dict[str, Any]) -> bool:
        for name in {**before, **now}:
            if before.get(name) == now.get(name):
                continue
            if self.overwrite:
                return True
            raise UserError(
                f"{self.partial} holds a run with {name} {before.get(name)!r}, this one has "
                f"{now.get(name)!r}: give the same to resume it, another --out, or --overwrite"
            )
        return False

    def check_rows(self, rows: Iterable[Any]) -> None:
        """Check that an earlier run has ranked the same rows.

        Args:
            rows: as many as it has done.

        Raises:
            UserError: a row has changed, or is gone.
        """
        for number, (line, row) in enumerate(zip_longest(self._lines(), rows)):
            if row is None or line["digest"] != row_digest(row):
                raise UserError(
                    f"row {number} of the input has changed since {self.partial} was begun: delete "
                    "that file to begin again"
                )

    def write(self, rows: Iterable[tuple[str, Ranked]]) -> None:
        """Append rows, each with its digest, and flush them."""
        self._append({"digest": digest, **_record(ranked)} for digest, ranked in rows)

    def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(sealed(dict(record))) + "\n" for record in records)
        with naming(self.partial):
            self.file.write(lines.encode())
            self.file.flush()

    def _close(self) -> None:
        with suppress(OSError):  # of a write that failed, which was named
            self.file.close()

    def records(self) -> Iterator[dict[str, Any]]:
        """Read back what was written, row by row."""
        for number, record in enumerate(self._lines()):
            record.pop("digest")
            yield {"row": number, **record}

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self.partial.open("rb") as file:
            file.readline()
            for number, line in enumerate(file):
                yield unsealed(json.loads(line), f"{self.partial}, row {number}")

    def finish(self, options: list[str] | None) -> None:
        """Make the output of all rows.

        Args:
            options: the options of every row; None where rows have their own.
        """
        with new_file(self.out, self.overwrite, self.inputs) as temporary:
            writers = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
            writers[self.out.suffix](temporary, self.records(), options)
        self.partial.unlink()


def row_digest(row: Any) -> str:
    """Digest of a row's content, to tell whether the input has changed."""
    return digest([str(row) if isinstance(row, Exception) else row])


def _record(ranked: Ranked) -> dict[str, Any]:
    return {**ranked._asdict(), "probability": ranked.probability}


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = unsealed(json.loads(line), "") if line.endswith(b"\n") else None
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _flat(record: dict[str, Any], options: list[str] | None) -> dict[str, Any]:
    """A row of a table: a column per option, or the options of the row as JSON."""
    row = {name: record[name] for name in COLUMNS}
    for kind in ("probabilities", "log_probabilities"):
        if options is None:
            row[kind] = json.dumps(record[kind], ensure_ascii=False)
        else:
            name = kind.removesuffix("ies") + "y"
            row |= {f"{name}: {option}": record[kind].get(option) for option in options}
    return row


def _write_jsonl(path: Path, records: Iterable[dict], options: list[str] | None) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _columns(options: list[str] | None) -> list[str]:
    nothing: dict[str, Any] = dict.fromkeys(COLUMNS)
    return list(_flat({**nothing, "probabilities": {}, "log_probabilities": {}}, options))


def _write_csv(path: Path, records: Iterable[dict], options: list[str] | None) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns(options))
        writer.writeheader()
        writer.writerows(_flat(record, options) for record in records)


def _write_parquet(path: Path, records: Iterable[dict], options: list[str] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"row": pa.int64(), "probability": pa.float64(), "agreement": pa.float64()}
    schema = pa.schema(
        [
            (name, kinds.get(name, pa.float64() if ": " in name else pa.string()))
            for name in _columns(options)
        ]
    )
    rows = (_flat(record, options) for record in records)
    with pq.ParquetWriter(path, schema) as writer:
        while part := list(islice(rows, ROWS_OF_A_PART)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
