"""Helpers of the tests of text preparation: invented text, short calls, readers by definition."""

import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from metro.data.text.corpus import prepare_text
from metro.utils.progress import Progress

ALL_FILES = ("dict.txt", "sp.model", "train.bin", "train.idx", "valid.bin", "valid.idx")


def random_text(seed: int, num_lines: int) -> str:
    """Lines of invented words with punctuation; about every tenth is empty."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(300)]
    marks = ["{}", "{}", "{}", "{},", "{}.", "({})", "“{}”", "{}'s", "{}☃", "É{}"]
    lines = [
        " ".join(rng.choice(marks).format(rng.choice(words)) for _ in range(rng.randint(1, 20)))
        for _ in range(num_lines)
    ]
    return "".join("\n" if rng.random() < 0.1 else line + "\n" for line in lines)


class Said(Progress):
    """Progress that keeps the lines that a user is told."""

    def __init__(self):
        super().__init__(enabled=False)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class StopsAfter(Said):
    """Progress that interrupts after so many calls."""

    def __init__(self, num_calls: int):
        super().__init__()
        self.num_left = num_calls

    def show(self, *state) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise KeyboardInterrupt


def prepare(inputs, out, vocab, **settings):
    """With defaults that make a test quick, and what the user was told."""
    progress = Said()
    settings = {"num_workers": 1, "valid_fraction": 0, "progress": progress, **settings}
    result = prepare_text(inputs=inputs, out=out, vocab=vocab, **settings)
    return result, "\n".join(progress.lines)


def files_of(folder: Path) -> dict[str, bytes]:
    """The output, without the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def items_of(prefix: Path) -> list[list[int]]:
    """Read .bin/.idx by their definition."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00" and index[17] == 8
    count = int.from_bytes(index[18:26], "little")
    sizes = np.frombuffer(index, "<i4", count, 26)
    starts = np.frombuffer(index, "<i8", count, 26 + 4 * count)
    ids = np.fromfile(prefix.with_suffix(".bin"), "<u2")
    items = [ids[a // 2 : a // 2 + n].tolist() for a, n in zip(starts, sizes, strict=True)]
    assert sum(map(len, items)) == len(ids)
    return items


def kill_after_next_save(process: subprocess.Popen, state: Path, seconds: float) -> bool:
    """Kill a run at a random moment up to `seconds` after it saves; False if it ended before."""
    before = state.read_bytes() if state.exists() else None
    while process.poll() is None:
        if state.exists() and state.read_bytes() != before:
            time.sleep(random.random() * seconds)
            process.send_signal(signal.SIGKILL)
            return True
        time.sleep(0.005)
    return False
