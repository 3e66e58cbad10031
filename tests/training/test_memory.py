"""Training on the CPU keeps its memory from update to update, without gaps that grow."""

import json
from pathlib import Path

import pytest

from tests.processes import run_python
from tests.training.kept import COUNTED, FEW, MANY, NEW_PAGES, ONCE, new_pages, of_glibc
from tests.training.tiny import TINY

pytest.importorskip("accelerate", reason="accelerate is not installed (make install)")
pytestmark = of_glibc

RESERVED = "from metro.training.memory import reserve_heap; reserve_heap()\n"


@pytest.mark.parametrize("function", ["pretrain", "finetune"])
def test_training_keeps_its_memory(function, pretraining_data, t5_folder, prepared, tmp_path):
    """Oracle: the pages that the system gave."""
    options = {
        "pretrain": {**TINY, "data": pretraining_data, "max_update": 1},
        "finetune": {"model": t5_folder, "data": prepared, "max_steps": 1, "use_cpu": True},
    }[function] | {"output_dir": tmp_path / "out"}
    code = f"import json, metro, sys; metro.{function}(progress=False, **json.loads(sys.argv[1]))"
    code = COUNTED + code + ONCE + NEW_PAGES
    assert new_pages(code, json.dumps(options, default=str)) < FEW


@pytest.mark.parametrize(
    "chosen",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_settings_that_the_user_chose_stay(chosen):
    """Oracle: as above."""
    assert new_pages(RESERVED + NEW_PAGES) < FEW
    assert new_pages(RESERVED + NEW_PAGES, env=chosen) > MANY
    assert new_pages(NEW_PAGES) > MANY  # glibc by itself


def test_a_limit_on_addresses_leaves_room_for_them():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))\n"
    assert new_pages(limit + RESERVED + NEW_PAGES) > MANY


def test_kept_memory_is_in_huge_pages():
    """Oracle: what the system says of the heap."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no huge pages")
    code = """
import torch
tensor = torch.ones(2**24)
heap = open("/proc/self/smaps").read().split("[heap]")[1:]
lines = [line for part in heap for line in part.splitlines() if line.startswith("AnonHugePages")]
print(sum(int(line.split()[1]) for line in lines) // 1024)
"""
    assert int(run_python("-c", RESERVED + code).stdout) >= 60  # of 64 MiB


def test_gaps_are_given_back_once_they_are_an_eighth_of_what_an_update_needs():
    """Oracle: what the system says that the process has beside files, in MiB."""
    code = """
import numpy as np
from metro.training.memory import Heap

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def update(mebibytes):
    np.ones(mebibytes * 2**17)
    before = resident()
    heap.tidy()
    print(round(before - resident()), round(heap.needed / 2**20 - before))

heap, weights = Heap(), np.ones(2**27)
for mebibytes in (100, 150, 400, 150, 260, 400, 400):
    update(mebibytes)
"""
    found = run_python("-c", RESERVED + code).stdout.splitlines()
    given, below = zip(*(map(int, line.split()) for line in found), strict=True)
    assert [each > 50 for each in given] == [False, False, True, False, False, True, False]
    assert abs(below[0]) <= 1  # what the first update needed is what the process had
