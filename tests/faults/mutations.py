"""Damage files of METRO's at random, and see whether their readers say so.

python -m tests.faults.mutations [--each 3] [--seed 1] [--only NAME] [--page docs/reliability.md]
"""

import argparse
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import processes
from tests.faults.jobs import (
    FAIRSEQ,
    FINETUNE,
    PRETRAIN,
    contents,
    evaluated,
    evaluation,
    file_result,
    finished_model,
    logged_losses,
    trained,
)
from tests.faults.kills import make_inputs, put_into, run, start

RANK = (
    "metro rank {w}/hf_new/model --input {w}/rows.jsonl --text text --options good bad "
    "--out {out}/mails.jsonl --device cpu"
)
DAMAGED = "damaged"
"""What the copy is called in the folder that the command runs in."""
MOST_ALIKE = 3
"""Files of one folder with one ending that are damaged."""
LEAST_TURNS = 12
"""Times that the files of a reader are damaged in all."""
NOT_READ = (".py", ".md", ".tmp", ".lock")


class Reader(NamedTuple):
    """A command that reads what is damaged."""

    source: str
    """Folder or file of the inputs, which is copied to ``damaged``."""
    words: str
    """The command; ``{w}`` stands for the inputs."""
    result: Callable[[Path], Any]
    """What must be equal to that of undamaged files, from the folder it ran in."""


def resumed_model(folder: Path) -> dict:
    return finished_model(folder, "damaged")


def said(folder: Path) -> str:
    """Everything that a command said but times."""
    return (folder / "log").read_text(errors="replace")


READERS = {
    "text, `metro pretrain`": Reader(
        "data", PRETRAIN.format(data="damaged", out="out", updates=2), finished_model
    ),
    "text, fairseq": Reader(
        "data", FAIRSEQ.format(data="damaged", updates=2) + " --save-dir save --no-save",
        lambda folder: logged_losses(said(folder)),
    ),
    "prompts, `metro finetune`": Reader(
        "old_prompts",
        FINETUNE.format(data="damaged", out="out", steps=2, save=0),
        finished_model,
    ),
    "run, `metro report`": Reader(
        "runs/new", "metro report damaged --out report", lambda folder: contents(folder / "report")
    ),
    "run, the same `metro evaluate`": Reader(
        "runs", " ".join(evaluation("{w}", "{w}/hf_new/model", "new", "damaged")),
        lambda folder: evaluated(folder, "damaged/new"),
    ),
    "rows ranked so far, `metro rank`": Reader(
        "ranked", RANK.format(w="{w}", out="damaged"),
        lambda folder: (folder / "damaged/mails.jsonl").read_bytes(),
    ),
    "checkpoint, `metro pretrain`": Reader(
        "pretrained", PRETRAIN.format(data="{w}/data", out="damaged", updates=4), resumed_model
    ),
    "checkpoint, `metro finetune`": Reader(
        "finetuned", FINETUNE.format(data="{w}/prompts", out="damaged", steps=4, save=1),
        resumed_model,
    ),
    "checkpoint, fairseq": Reader(
        "new", FAIRSEQ.format(data="{w}/data", updates=4) + " --save-dir damaged",
        lambda folder: trained(folder, "damaged"),
    ),
    "checkpoint of fairseq, `metro convert`": Reader(
        "new.pt", "metro convert to-hf damaged --out model --vocab {w}/vocab",
        lambda folder: contents(folder / "model"),
    ),
    "exported model, `metro generate`": Reader(
        "hf_new/model", "metro generate damaged the_sea --max-new-tokens 9", said
    ),
    "exported model, `metro evaluate`": Reader(
        "hf_new/model", " ".join(evaluation("{w}", "damaged", "run")), evaluated
    ),
    "exported model, `metro convert`": Reader(
        "hf_new/model", "metro convert to-fairseq damaged --out out.pt", file_result
    ),
}  # fmt: skip
KINDS = ("named", "named by `metro doctor`", "no difference", "unnamed", "traceback", "unnoticed")


def damage(path: Path, draw: random.Random) -> str:
    """Flip a bit, cut the file, empty it, or swap two parts of it; return which."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "cut", "empty", "swap"])
    place = draw.randrange(len(content)) if content else 0
    if kind == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "swap":
        content = content[place:] + content[:place]
    else:
        del content[place if kind == "cut" else 0 :]
    path.unlink()  # it may have another name
    path.write_bytes(content)
    return kind


class Mutator:
    """Damages what one command reads."""

    def __init__(self, reader: Reader, inputs: Path, work: Path):
        self.reader, self.inputs, self.work = reader, inputs, work
        self.words = reader.words.format(w=inputs).split()
        self.copy()
        status = self.run(self.words)
        assert status == 0, said(work)[-3000:]
        self.expected = reader.result(work)
        self.files = self.copy()

    def copy(self) -> list[Path]:
        """Copy what is read; return its files."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        source, place = self.inputs / self.reader.source, self.work / DAMAGED
        if source.is_file():
            shutil.copyfile(source, place)
            return [place]
        shutil.copytree(source, place)
        alike, files = Counter[tuple](), []
        for path in sorted(place.rglob("*")):
            if path.is_file() and path.suffix not in NOT_READ and "events" not in path.name:
                alike[path.parent, path.suffix] += 1
                if alike[path.parent, path.suffix] <= MOST_ALIKE:
                    files.append(path)
        return files

    def run(self, words: list[str]) -> int | None:
        (self.work / "log").unlink(missing_ok=True)
        return processes.wait(start(words, self.work, {}), 300)

    def mutate(self, number: int, seed: str) -> tuple[str, str]:
        """Damage a file and let the command read it; the verdict, and what to say of it."""
        self.copy()
        path = self.files[number]
        kind = damage(path, random.Random(seed))
        status = self.run(self.words)
        log = said(self.work).strip()
        last = log.splitlines()[-1] if log else ""
        where = f"{path.relative_to(self.work)} {kind}: {last[:300]}"
        if status == 0 and self.reader.result(self.work) == self.expected:
            return "no difference", where
        if status == 0:
            self.copy()
            damage(path, random.Random(seed))
            words = ["metro", "doctor", str(path.parent if path.parent == self.work else DAMAGED)]
            is_named = self.run(words) == 1 and path.name in said(self.work)
            return KINDS[1] if is_named else "unnoticed", where
        if "Traceback" in log:
            return "traceback", where
        return "named" if path.name in last else "unnamed", where


def stop_ranking(inputs: Path) -> None:
    """Kill a run that has ranked all rows, before it makes the output of them."""
    folder = inputs / "ranked"
    folder.mkdir()
    words = RANK.format(w=inputs, out="ranked").split()
    status = processes.wait(start(words, inputs, {}, processes.kill_before(4, folder)), 300)
    assert status == -signal.SIGKILL, said(inputs)
    assert (folder / ".mails.jsonl.partial").exists() and not (folder / "mails.jsonl").exists()


def mutate_all(folder: Path, each: int, seed: int, only: str = "") -> dict[str, Counter]:
    inputs, found = make_inputs(folder), {}
    pretrained = PRETRAIN.format(data="{w}/data", out="pretrained", updates=2)
    finetuned = FINETUNE.format(data="{w}/prompts", out="finetuned", steps=2, save=1)
    for words in (pretrained, finetuned):
        run(words.format(w=inputs).split(), inputs)
    stop_ranking(inputs)
    for name, reader in READERS.items():
        if only in name:
            counts = found[name] = Counter[str]()
            mutator = Mutator(reader, inputs, folder / "work")
            for number in range(len(mutator.files)):
                for turn in range(max(each, LEAST_TURNS // len(mutator.files))):
                    verdict, where = mutator.mutate(number, f"{seed} {name} {number} {turn}")
                    counts[verdict] += 1
                    if verdict not in KINDS[:3]:
                        print(f"{name}: {where}: {verdict}", flush=True)
            print(f"{name}: {dict(counts)}", flush=True)
    return found


def table(found: dict[str, Counter]) -> str:
    lines = [f"| damaged, read by | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for name, counts in [*found.items(), ("all", sum(found.values(), Counter()))]:
        lines.append(f"| {name} | {' | '.join(str(counts[kind]) for kind in KINDS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--each", type=int, default=3, help="times that each file is damaged")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="readers with this in their name")
    parser.add_argument("--page", type=Path, help="page that gets the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = mutate_all(Path(folder), options.each, options.seed, options.only)
    print(table(found))
    if options.page:
        put_into(options.page, "mutations", table(found))


if __name__ == "__main__":
    main()
