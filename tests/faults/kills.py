"""Kill every command at random inside its work, and check what is left: `make faults`.

python -m tests.faults.kills [--kills 8] [--seed 1] [--page docs/reliability.md]
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import processes
from tests.faults.jobs import JOBS, Job, World

ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"TRANSFORMERS_VERBOSITY": "error", "NO_COLOR": "1"},
}
MOST_KILLS = 5
"""Of one run, which is left alone then until it has finished."""


@dataclass
class Outcome:
    """Kills of a job."""

    places: Counter = field(default_factory=Counter)
    """before, inside and after the work -> number of kills."""
    finished: int = 0
    """Runs that were killed, and finished equal to the one left alone."""
    refused: int = 0
    """Runs without room for their files that ended in one line naming one, and then likewise."""


def run(words: list[str], folder: Path, before=None) -> str:
    """Run a command to its end; what it said."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    pid = start(words, folder, {}, before)
    status = processes.wait(pid, 300)
    said = log.read_text()
    assert status == 0, f"{' '.join(words)[:200]}: {status}\n{said[-3000:]}"
    return said


def start(words: list[str], folder: Path, env: dict, before=None, log: int | None = None) -> int:
    def inside() -> None:
        os.chdir(folder)
        if before is not None:
            before()

    return processes.command(words, log or folder / "log", {**ENVIRONMENT, **env}, inside)


class Killer:
    """Kills one job again and again.

    Args:
        job: what is killed.
        world: folder of the inputs.
        folder: for the runs.
        random: draws moments.
    """

    def __init__(self, job: Job, world: Path, folder: Path, draw: random.Random):
        self.job, self.world, self.folder, self.random = job, world, folder, draw
        self.outcome = Outcome()
        self.words = job.words(world)
        alone = self.fresh("alone")
        before = None
        if not job.begun:
            before = processes.kill_before(0, alone, folder / "count")
        log = self.complete(alone, before)
        self.num_operations = (folder / "count").stat().st_size if before else 0
        self.expected, self.losses = job.result(alone), job.losses(log)

    def fresh(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if self.job.old is not None:
            self.job.old(self.world, folder)
        return folder

    def complete(self, folder: Path, before=None) -> str:
        """Let the job run to its end; what it said."""
        if not self.job.begun:
            return run(self.words, folder, before)
        log = folder / "log"
        log.unlink(missing_ok=True)
        pids = [start(self.words, folder, env) for env in processes.ranks(self.job.processes)]
        began = time.monotonic()
        if folder.name == "alone":
            self.wait_for_work(log, pids)
            began = time.monotonic()
        statuses = [processes.wait(pid, 300) for pid in pids]
        assert not any(statuses) and None not in statuses, log.read_text()[-3000:]
        if folder.name == "alone":
            self.seconds = time.monotonic() - began
        return log.read_text()

    def kill_until(self, wanted: int) -> Outcome:
        """Kill runs until so many kills fell inside the work."""
        series = 0
        while self.outcome.places["inside"] < wanted and series < 5 * wanted + 5:
            series += 1
            folder = self.fresh("killed")
            old = self.job.result(folder) if self.job.old else None
            said, kept = "", 0.0
            for _ in range(self.random.randint(1, MOST_KILLS)):
                if self.outcome.places["inside"] >= wanted:
                    break
                said += self.kill(folder)
                now = self.job.kept(folder, said)
                assert now >= kept, f"{self.job.name}: {kept} before, {now} after a kill"
                kept = now
                self.check_either(folder, old)
            said += self.complete(folder)
            differences = different(self.job.result(folder), self.expected)
            assert not differences, f"{self.job.name}: another result: {differences}"
            for update, loss in self.job.losses(said).items():
                assert self.losses[update] == loss, (self.job.name, update, loss)
            self.outcome.finished += 1
        return self.outcome

    def starve(self, number: int) -> None:
        """Run without room for the largest file, then with it; a limit acts as a full disk does.

        Raises:
            AssertionError: it does not end in one line that names a file, or loses something.
        """
        largest = max(path.stat().st_size for path in (self.folder / "alone").rglob("*.*"))
        for _ in range(number):
            folder = self.fresh("starved")
            old = self.job.result(folder) if self.job.old else None
            most = int(largest * self.random.uniform(0.1, 0.9))

            def limit(most=most) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

            heard, said = os.pipe()
            pid = start(self.words, folder, {}, limit, said)
            os.close(said)
            with open(heard, errors="replace") as pipe:
                log = pipe.read()
            status, last = processes.wait(pid, 300), log.strip().splitlines()[-1]
            assert status and "Traceback" not in log, f"{self.job.name}: {status}\n{log[-3000:]}"
            assert re.match(r"error: \S+ .*(ulimit|disk)", last), f"{self.job.name}: {last}"
            self.job.kept(folder, log)
            self.check_either(folder, old)
            self.complete(folder)
            differences = different(self.job.result(folder), self.expected)
            assert not differences, f"{self.job.name}: another result: {differences}"
            self.outcome.refused += 1

    def check_either(self, folder: Path, old) -> None:
        """What a command replaces is the old or the new output, or the new one lies beside it."""
        if old is None or any(folder.glob("out.partial/pr*.json")):
            return
        assert self.job.result(folder) in (old, self.expected), f"{self.job.name}: neither"

    def kill(self, folder: Path) -> str:
        """Start the job and kill it; what it said."""
        log = folder / "log"
        log.unlink(missing_ok=True)
        if not self.job.begun:
            number = self.random.randint(1, max(1, self.num_operations - 1))
            pid = start(self.words, folder, {}, processes.kill_before(number, folder))
            status = processes.wait(pid, 300)
            self.outcome.places["inside" if status == -signal.SIGKILL else "after"] += 1
            return log.read_text()
        pids = [start(self.words, folder, env) for env in processes.ranks(self.job.processes)]
        self.wait_for_work(log, pids)
        time.sleep(self.random.random() * self.seconds)
        victim = self.random.choice(pids)
        alive = processes.wait(victim, 0.001) is None
        if alive:
            os.kill(victim, signal.SIGKILL)
            processes.wait(victim, 60)
        for pid in pids:
            if pid != victim:
                processes.end(pid)
        said = log.read_text()
        begun, ended = (re.search(mark, said) for mark in (self.job.begun, self.job.ended))
        place = "inside" if begun and alive and not ended else "after" if ended else "before"
        self.outcome.places[place] += 1
        return said

    def wait_for_work(self, log: Path, pids: list[int]) -> None:
        """Wait until the log says that the work has begun, or the processes have ended."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if log.exists() and re.search(self.job.begun, log.read_text()):
                return
            if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return  # it had finished before
            time.sleep(0.005)
        raise AssertionError(f"{self.job.name} did not begin: {log.read_text()[-2000:]}")


def different(result: dict, expected: dict) -> list[str]:
    """Names of what two results do not have in common."""
    names = sorted({*result, *expected})
    return [name for name in names if result.get(name) != expected.get(name)]


def make_inputs(folder: Path) -> Path:
    """Make what the commands read; this process has then imported all that they import."""
    processes.import_everything()
    os.environ.update(ENVIRONMENT)

    def in_child(function) -> None:
        assert processes.wait(processes.fork(function, folder / "child.log"), 120) == 0

    inputs = folder / "inputs"
    inputs.mkdir()
    World(inputs, run, in_child)
    return inputs


def kill_all(folder: Path, kills: int, seed: int, names: str = "") -> dict[str, Outcome]:
    """Kill every job so many times inside its work."""
    inputs, outcomes = make_inputs(folder), {}
    for job in JOBS:
        if names in job.name:
            place = folder / re.sub(r"\W+", "_", job.name)
            place.mkdir()
            began = time.monotonic()
            killer = Killer(job, inputs, place, random.Random(f"{seed} {job.name}"))
            if job.processes == 1:
                killer.starve(max(1, kills // 5))
            outcomes[job.name] = killer.kill_until(kills)
            seconds = time.monotonic() - began
            print(f"{job.name}: {outcomes[job.name]}, {seconds:.0f} s", flush=True)
    return outcomes


def table(outcomes: dict[str, Outcome]) -> str:
    lines = [
        "| command | killed inside its work | before or after it | states lost | "
        "runs killed, then equal to one left alone | no room: one line, then equal |",
        "|---|---|---|---|---|---|",
    ]
    total = Counter[str]()
    for name, outcome in outcomes.items():
        inside = outcome.places["inside"]
        outside = sum(outcome.places.values()) - inside
        counts = {"inside": inside, "outside": outside, "lost": 0}
        counts |= {"finished": outcome.finished, "refused": outcome.refused}
        total.update(counts)
        lines.append(f"| {name} | {' | '.join(map(str, counts.values()))} |")
    lines.append(f"| all | {' | '.join(map(str, total.values()))} |")
    return "\n".join(lines)


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what is between `<!-- name -->` and `<!-- end of name -->` of a page."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert mark and end, f"{page} has no place for {name}"
    page.write_text(f"{before}{mark}\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=8, help="inside each command's work")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="commands with this in their name")
    parser.add_argument("--page", type=Path, help="page that gets the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        outcomes = kill_all(Path(folder), options.kills, options.seed, options.only)
    print(table(outcomes))
    if options.page:
        put_into(options.page, "kills", table(outcomes))


if __name__ == "__main__":
    main()
