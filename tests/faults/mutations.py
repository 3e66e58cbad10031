"""Damage files of METRO's at random, and see whether their readers say so.

python -m tests.faults.mutations [--each 4] [--seed 1] [--page docs/reliability.md]
"""

import argparse
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults import processes
from tests.faults.jobs import METRO_TINY, UPDATES, contents
from tests.faults.kills import make_inputs, put_into, start

TWO_UPDATES = METRO_TINY.replace(f"--max-update {UPDATES}", "--max-update 2")
READERS = {
    "pretraining data": ("data", f"fairseq-train {{0}} --save-dir save {TWO_UPDATES} --no-save"),
    "prepared prompts": (
        "prompts",
        "metro finetune --model {w}/t5 --data {0} --output-dir out --max-steps 2 --save-steps 0 "
        "--logging-steps 1 --batch-size 64 --use-cpu --report-to none",
    ),
    "run folder": ("runs/new", "metro report {0} --out report"),
    "exported model": ("hf_new/model", "metro convert to-fairseq {0} --out out.pt"),
    "fairseq checkpoint": (
        "new",
        "metro convert to-hf {0}/checkpoint_last.pt --out model --vocab {w}/vocab",
    ),
}
"""What is damaged -> (its folder, a command that reads it)."""
NOT_READ = {"README.md", "training.json", "log", "prepare_text.json"}


def damage(path: Path, draw: random.Random) -> str:
    """Flip a bit, cut the file, or empty it; return which."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "cut", "empty"])
    if kind == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content)) if kind == "cut" and content else 0 :]
    path.unlink()  # it may have another name
    path.write_bytes(content)
    return kind


def judge(status: int | None, log: str, place: Path, result: dict, expected: dict) -> str:
    if status == 0:
        return "no difference" if result == expected else "unnoticed"
    if "Traceback" in log:
        return "a traceback"
    last = log.strip().splitlines()[-1] if log.strip() else ""
    return "an error that names it" if str(place) in log or place.name in last else "another error"


KINDS = ("an error that names it", "another error", "a traceback", "no difference", "unnoticed")


def mutate_all(folder: Path, each: int, seed: int) -> dict[str, Counter]:
    inputs, found = make_inputs(folder), {}
    for name, (source, words) in READERS.items():
        draw = random.Random(f"{seed} {name}")
        counts = found[name] = Counter[str]()

        def read(place: Path, work: Path, words=words) -> tuple[int | None, str, dict]:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            pid = start(words.format(place, w=inputs).split(), work, {})
            status = processes.wait(pid, 120)
            log = (work / "log").read_text(errors="replace")
            files = contents(work)
            files.pop("log")
            files = {key: value for key, value in files.items() if "events" not in key}
            return status, log, files

        place = folder / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(inputs / source, place)
        status, log, expected = read(place, folder / "work")
        assert status == 0, log[-3000:]
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        files = [path for path in files if path.name not in NOT_READ and path.suffix != ".py"]
        for path in files * each:
            before = path.read_bytes()
            kind = damage(path, draw)
            status, log, result = read(place, folder / "work")
            verdict = judge(status, log, path, result, expected)
            counts[verdict] += 1
            if verdict in ("unnoticed", "a traceback", "another error"):
                last = log.strip().splitlines()[-1:] or [""]
                print(f"{name}: {path.name} {kind}: {verdict}: {last[0][:200]}", flush=True)
            path.write_bytes(before)
        print(f"{name}: {dict(counts)}", flush=True)
    return found


def table(found: dict[str, Counter]) -> str:
    lines = [f"| damaged | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for name, counts in found.items():
        lines.append(f"| {name} | {' | '.join(str(counts[kind]) for kind in KINDS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--each", type=int, default=4, help="times that each file is damaged")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--page", type=Path, help="page that gets the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = mutate_all(Path(folder), options.each, options.seed)
    print(table(found))
    if options.page:
        put_into(options.page, "mutations", table(found))


if __name__ == "__main__":
    main()
