"""Datasets and prompt templates to finetuning data: the work of `metro prepare-prompts`.

A part is one side (train or valid) of one dataset. Parts are done one after the other, each in
chunks of rows over all cores; after each chunk the parent appends to the files of the part's tasks.
A killed run is continued by the same command, behind the last saved chunk. Neither the number of
workers nor an interruption changes a byte.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from metro.data.datasets import name_of
from metro.data.indexed_file import best_dtype
from metro.data.jsonl_rows import UnusableRow
from metro.data.prepared_folder import Prepared
from metro.data.prompts.encoding import MAX_SOURCE_LENGTH
from metro.data.prompts.examples import (
    VALUE_CUT,
    ExampleSettings,
    LeftOut,
    PromptedExample,
    count_row,
    make_example,
)
from metro.data.prompts.plan import PromptPlan, ignored_options, make_plan
from metro.data.prompts.sandbox import ProtectedRow
from metro.data.prompts.sources import Part, PartPlan, Unavailable
from metro.data.prompts.stored import (
    FairseqEncoder,
    FairseqTaskWriter,
    JsonlTaskWriter,
    PromptFolder,
    encode_jsonl,
)
from metro.data.settings import PreparePromptsSettings
from metro.utils.files import naming
from metro.utils.messages import UserError, one_line, percent, shortened
from metro.utils.progress import Progress
from metro.utils.worker_pool import available_cores, map_in_order

CHUNK_EXAMPLES = 2000
TOO_LONG = f"source longer than {MAX_SOURCE_LENGTH} tokens (kept; training cuts or refuses it)"
CHECKPOINT_SECONDS = 5.0
_SYNC_THREADS = 32


def prepare_prompts(
    settings: PreparePromptsSettings | None = None,
    *,
    progress: bool | Progress = True,
    **options: Any,
) -> Prepared:
    """Turn datasets and templates into a folder that finetuning reads; resume a killed call.

    Args:
        settings: all options, or give them one by one.
        progress: show progress on stderr.
        options: fields of `PreparePromptsSettings`, such as ``mixture``, ``out`` and ``limit``.

    Raises:
        UserError: an option is wrong, or not a single example could be made.
    """
    settings = PreparePromptsSettings.of(settings, **options)
    with Progress.of(progress) as shown:
        return _prepare(settings, shown)


def _prepare(options: PreparePromptsSettings, progress: Progress) -> Prepared:
    if options.out is None:
        raise UserError("out is missing: name the folder to make (or add --dry-run)")
    plan = make_plan(options)
    return prepare_plan(
        plan, options.out, progress, overwrite=options.overwrite, num_workers=options.num_workers
    )


def prepare_plan(
    plan: PromptPlan,
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    num_workers: int | None = None,
) -> Prepared:
    """Make what a plan says; see `prepare_prompts`."""
    folder = PromptFolder(out, plan.fingerprint())
    finished = folder.finished_manifest(overwrite)
    if finished and not (overwrite and finished["unavailable"]):
        missing = len(finished["unavailable"])
        again = f" ({missing} parts were not available; --overwrite tries again)" if missing else ""
        progress.say(f"{folder.out} is already finished; nothing to do{again}")
        return Prepared(folder.out, finished, True)
    earlier = folder.open(overwrite)
    if earlier and "files" in earlier:  # killed while the finished files were being moved
        return Prepared(folder.out, folder.complete(), False)
    for note in ignored_options(plan):
        progress.say(f"warning: {note}")
    num_workers = num_workers or available_cores()
    work = _Preparation(plan, folder, earlier or {}, num_workers, progress)
    with naming(folder.partial):
        return Prepared(folder.out, work.run(), False)


class EncodedTask(NamedTuple):
    """The examples of one template in a chunk of rows."""

    payload: tuple
    """Arrays and bytes for the writer of the format."""
    dropped: dict[str, LeftOut]
    noted: dict[str, LeftOut]


class ChunkRenderer:
    """(start, stop) rows of a part -> one ``EncodedTask`` for each template; for workers."""

    def __init__(self, part: Part, settings: ExampleSettings, encoder):
        self.part, self.settings, self.encoder = part, settings, encoder

    def __call__(self, bounds: tuple[int, int]) -> list[EncodedTask]:
        plan = self.part.plan
        templates = plan.templates
        examples: list[list[PromptedExample]] = [[] for _ in templates]
        dropped: list[dict[str, LeftOut]] = [{} for _ in templates]
        noted: list[dict[str, LeftOut]] = [{} for _ in templates]
        name = name_of(plan.dataset, plan.subset)
        for number, split, index, row in self.part.rows(*bounds):
            if not isinstance(row, UnusableRow) and "answer_choices" not in row:
                row = ProtectedRow(row)
            for i, template in enumerate(templates):
                where = f"{name}, {template.name!r}, row {number}"
                try:
                    if isinstance(row, UnusableRow):
                        raise row
                    example = make_example(template, row, split, index, self.settings)
                except UnusableRow as error:
                    count_row(dropped[i], error, where)
                    continue
                if example["answer_choices"] is not None and example["label"] is None:
                    detail = f"{example['target']!r} is not in {example['answer_choices']}"
                    flaw = UnusableRow("answer not among the choices (kept)", detail)
                    count_row(noted[i], flaw, where)
                if "cut" in example:
                    count_row(noted[i], UnusableRow(f"{VALUE_CUT} (kept)"), where)
                example["row"] = number
                examples[i].append(example)
        encoded = []
        for i, (template, found) in enumerate(zip(templates, examples, strict=True)):
            payload = self.encoder(found)
            if isinstance(self.encoder, FairseqEncoder):
                for example, size in zip(found, payload[1], strict=True):
                    if size + 1 > MAX_SOURCE_LENGTH:  # with <s>
                        where = f"{name}, {template.name!r}, row {example['row']}"
                        count_row(noted[i], UnusableRow(TOO_LONG, f"{size + 1} tokens"), where)
            encoded.append(EncodedTask(payload, dropped[i], noted[i]))
        return encoded


class _Preparation:
    """The run of one command."""

    def __init__(
        self, plan: PromptPlan, folder: PromptFolder, earlier: dict, num_workers, progress
    ):
        self.plan, self.folder, self.num_workers = plan, folder, num_workers
        self.progress = progress
        self.done: dict[str, dict] = earlier.get("done", {})
        self.current: dict = earlier.get("current", {})
        self.unavailable: list[Unavailable] = [*plan.sources.without_templates()]
        self.vocabulary = plan.vocabulary if plan.format == "fairseq" else None
        self.num_rendered = sum(facts["rendered"] for facts in self.done.values())

    def run(self) -> dict:
        plans = self.plan.sources.plans()
        if self.done or self.current:
            self.progress.say(f"continuing after {len(self.done)} of {len(plans)} parts")
        elif self.plan.vocabulary:
            self.folder.copy_vocabulary(self.plan.vocabulary.folder)
        self.folder.save_state(self._state())
        for number, plan in enumerate(plans):
            if plan.key in self.done:
                continue
            try:
                part = self.plan.sources.load(plan)
            except (UserError, FileNotFoundError, PermissionError) as error:  # also if damaged
                self.unavailable.append(Unavailable(plan.side, plan.name, one_line(error) or ""))
                continue
            self._do(plan, part, number, len(plans))
        self._show("all", len(plans), len(plans))
        return self._finish(plans)

    def _show(self, step: str, parts_done: int, num_parts: int) -> None:
        note = f"{step}, {self.num_rendered:,} prompts"
        self.progress.show("preparing prompts", parts_done, num_parts, note)

    def _do(self, plan: PartPlan, part: Part, number: int, num_parts: int) -> None:
        earlier = self.current if self.current.get("part") == plan.key else {}
        if earlier and earlier["rows"] != part.num_rows:
            raise UserError(
                f"{plan.key} had {earlier['rows']:,} rows before the interruption and has "
                f"{part.num_rows:,} now: start again with --overwrite"
            )
        if self.current and not earlier:  # a part that is gone since: its files are dropped below
            self.current = {}
        start = earlier.get("next", 0)
        positions = earlier.get("positions", [None] * len(plan.templates))
        tasks = earlier.get("tasks") or [{"dropped": {}, "noted": {}} for _ in plan.templates]
        writers = [
            self._writer(plan, template.task_name, position)
            for template, position in zip(plan.templates, positions, strict=True)
        ]
        step = max(1, CHUNK_EXAMPLES // len(plan.templates))
        bounds = [
            (first, min(first + step, part.num_rows)) for first in range(start, part.num_rows, step)
        ]
        renderer = (part, self.plan.rendering, self._encoder())
        num_workers = min(self.num_workers, max(1, len(bounds)))
        saved, base = time.monotonic(), self.num_rendered
        self._show(plan.key, number, num_parts)
        try:
            for (_, stop), chunk in map_in_order(ChunkRenderer, renderer, bounds, num_workers):
                for writer, task, encoded in zip(writers, tasks, chunk, strict=True):
                    writer.append(encoded.payload)
                    _merge(task["dropped"], encoded.dropped)
                    _merge(task["noted"], encoded.noted)
                self.num_rendered = base + stop * len(plan.templates)
                self._show(plan.key, number, num_parts)
                if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    _together(writers, "flush")
                    positions = [writer.position for writer in writers]
                    self.current = {
                        "part": plan.key,
                        "rows": part.num_rows,
                        "next": stop,
                        "positions": positions,
                        "tasks": tasks,
                    }
                    self.folder.save_state(self._state())
                    saved = time.monotonic()
        except BaseException:
            for writer in writers:
                writer.close()
            raise
        _together(writers, "finish")
        for writer, task in zip(writers, tasks, strict=True):
            task["num_examples"] = writer.num_examples
        self.current = {}
        self.done[plan.key] = {"rendered": part.num_rows * len(plan.templates), "tasks": tasks}
        self.folder.save_state(self._state())

    def _writer(self, plan: PartPlan, task: str, position: list | None):
        folder = self.folder.task_folder(plan.side, task)
        if self.vocabulary is None:
            return JsonlTaskWriter(folder, plan.side, position)
        return FairseqTaskWriter(folder, plan.side, position, best_dtype(len(self.vocabulary)))

    def _encoder(self):
        if self.vocabulary is None:
            return encode_jsonl
        return FairseqEncoder(self.vocabulary, self.plan.lower)

    def _state(self) -> dict:
        return {"done": self.done, "current": self.current}

    def _finish(self, plans: list[PartPlan]) -> dict:
        splits: dict[str, dict] = {"train": {}, "valid": {}}
        groups: dict[str, list[str]] = {}
        empty = []
        for plan in plans:
            if plan.key not in self.done:
                for template in plan.templates:  # of a part that was begun and is gone since
                    self.folder.drop_task(plan.side, template.task_name)
                continue
            for template, task in zip(plan.templates, self.done[plan.key]["tasks"], strict=True):
                if not task["num_examples"]:
                    self.folder.drop_task(plan.side, template.task_name)
                    empty.append(f"{plan.side}/{template.task_name}")
                    continue
                splits[plan.side][template.task_name] = {
                    "dataset": plan.dataset,
                    "subset": plan.subset,
                    "prompt_name": template.name,
                    "num_examples": task["num_examples"],
                    "cap": plan.cap,
                }
                if task["noted"]:
                    counts = {reason: count for reason, (count, _) in task["noted"].items()}
                    splits[plan.side][template.task_name]["noted"] = counts
                if plan.side == "valid":
                    group = "_".join(filter(None, (plan.dataset, plan.subset)))
                    for key in (group, "valid"):
                        groups.setdefault(key, []).append(template.task_name)
        dropped, noted = self._counts("dropped"), self._counts("noted")
        wanted = "valid" if self.plan.mixture.validation_only else "train"
        if not splits[wanted]:
            self.folder.discard()
            raise UserError(self._nothing(dropped))
        if self.plan.format == "fairseq":
            self.folder.write_fairseq_tables(splits, groups)
        manifest = {
            "format": self.plan.format,
            "mixture": self.plan.mixture.name,
            "cap_of": self.plan.mixture.cap_of,
            "seed": self.plan.rendering.seed,
            "instruction_text": self.plan.rendering.instruction_text,
            "splits": splits,
            "valid_datasets": groups,
            "unavailable": [row._asdict() for row in self.unavailable],
            "left_out": self.plan.sources.left_out(),
            "empty_tasks": empty,
            "dropped": dropped,
            "noted": noted,
        }
        return self.folder.complete(manifest)

    def _counts(self, kind: str) -> dict[str, dict]:
        """Sum up reason -> number of examples, and where the first one is."""
        total: dict[str, dict] = {}
        for facts in self.done.values():
            for task in facts["tasks"]:
                for reason, (count, first) in task[kind].items():
                    entry = total.setdefault(reason, {"count": 0, "first": first})
                    entry["count"] += count
        return total

    def _nothing(self, dropped: dict) -> str:
        named: dict[str, list[str]] = {}
        for row in self.unavailable:
            named.setdefault(row.reason_of_any, []).append(f"{row.name} ({row.side})")
        reasons = [f"{shortened(names, 4)}: {reason}" for reason, names in named.items()]
        total = sum(facts["count"] for facts in dropped.values())
        reasons += [
            f"{d['count']:,} dropped ({percent(d['count'] / total)} %): {why} ({d['first']})"
            for why, d in dropped.items()
        ]
        shown = "".join(f"\n  {reason}" for reason in reasons[:20])
        more = f"\n  and {len(reasons) - 20} more" if len(reasons) > 20 else ""
        return f"{self.plan.sources.nothing_made}{shown}{more}"


def _together(writers: list, method: str) -> None:
    """Call a method of every writer in threads: syncing with the disk costs one wait then."""
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # ends before workers are forked again
        for done in [pool.submit(getattr(writer, method)) for writer in writers]:
            done.result()


def _merge(table: dict, new: dict[str, LeftOut]) -> None:
    for reason, (count, first) in new.items():
        earlier = table.get(reason)
        table[reason] = [earlier[0] + count, earlier[1]] if earlier else [count, first]
