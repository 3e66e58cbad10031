"""Killed, interrupted and competing runs of prepare-text lose, double and mix nothing."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metro.data.indexed_file import IndexedFileWriter
from metro.data.text import reading, writing
from metro.modeling.text_metro_t5 import Vocabulary
from metro.utils.locks import locked
from metro.utils.messages import UserError
from tests.data.prepared import (
    StopsAfter,
    files_of,
    items_of,
    kill_after_next_save,
    prepare,
    random_text,
)

RUN = """
import sys
from metro.data.text import reading, writing
from metro.data.text.corpus import prepare_text
reading.CHUNK_BYTES, writing.CHECKPOINT_SECONDS = 2000, 0
vocab, out, workers, *inputs = sys.argv[1:]
prepare_text(inputs=inputs, out=out, vocab=vocab, num_workers=int(workers), valid_fraction=0.1)
"""


def start(inputs, out, vocab, workers) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, vocab, out, workers, *inputs]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(text, vocab, tmp_path, workers):
    """Oracle: the same command left alone."""
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(random_text(1, 1500).encode()))
    inputs = [text, tmp_path / "b.txt.gz"]
    expected, _ = prepare(inputs, tmp_path / "expected", vocab, valid_fraction=0.1)
    out, state = tmp_path / "out", tmp_path / "out.partial/state.json"
    seen, resumed = [], 0
    for attempt in range(20):
        process = start(inputs, out, vocab, workers)
        if attempt < 6:
            kill_after_next_save(process, state, 0.15)
        _, said = process.communicate(timeout=60)
        resumed += "continuing after" in said
        if process.returncode == 0 or out.exists():  # killed after its last step: complete as well
            break
        position = json.loads(state.read_text())["position"]
        assert not seen or position >= seen[-1], "a restart must never lose finished chunks"
        seen.append(position)
    print(f"{len(seen)} kills, {resumed} continued")
    assert resumed >= 1 and files_of(out) == files_of(expected.folder)
    manifest = json.loads((out / "prepare_text.json").read_text())
    assert manifest["counts"] == expected.manifest["counts"]


def test_kill_in_every_step_of_finishing_is_survived(text, vocab, tmp_path, monkeypatch):
    """Oracle: a run that was left alone. Every file operation of the end fails once."""
    few = tmp_path / "few.txt"
    few.write_text("a\n\nb c\n\nd\n")
    expected, _ = prepare([few], tmp_path / "expected", vocab, valid_fraction=0.001)
    out = tmp_path / "out"
    prepare([few], out, vocab, cased=True)  # so that the end has to replace an earlier output

    class Killed(BaseException):
        pass

    steps = 0
    for step in range(1, 200):
        countdown = step

        def counted(original):
            def call(*args, **kwargs):
                nonlocal countdown
                countdown -= 1
                if countdown == 0:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("os.replace", "os.fsync", "os.rename", "shutil.move"):
                module, function = name.split(".")
                patch.setattr(name, counted(getattr(sys.modules[module], function)))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(IndexedFileWriter, "truncate", counted(IndexedFileWriter.truncate))
            try:
                prepare([few], out, vocab, valid_fraction=0.001, overwrite=True)
            except Killed:
                steps += 1
        if countdown > 0:
            break
        result, _ = prepare([few], out, vocab, valid_fraction=0.001, overwrite=True)
        assert files_of(out) == files_of(expected.folder), f"killed in step {step}"
        assert result.manifest["counts"] == expected.manifest["counts"]
        prepare([few], out, vocab, cased=True, overwrite=True)
    assert steps > 20


def test_resuming_with_other_settings_or_changed_input_is_refused(vocab, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(random_text(2, 500), encoding="utf-8")
    out = tmp_path / "out"
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(writing, "CHECKPOINT_SECONDS", 0)

    with pytest.raises(KeyboardInterrupt):
        prepare([text], out, vocab, progress=StopsAfter(5))
    with pytest.raises(
        ValueError, match="unfinished run that differs: lower was True and is False"
    ):
        prepare([text], out, vocab, cased=True)
    content = text.read_bytes()
    text.write_bytes(content + b"more\n")
    with pytest.raises(ValueError, match=r"input changed on disk: .*text.txt.*--overwrite"):
        prepare([text], out, vocab)
    result, said = prepare([text], out, vocab, overwrite=True)
    assert "continuing" not in said
    assert items_of(out / "train")[-1] == Vocabulary.from_folder(vocab).encode("more", True)


def test_interrupted_dataset_continues_at_its_record(vocab, tmp_path, monkeypatch):
    """Oracle: a run that was left alone."""
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    records = [{"text": line} for line in random_text(4, 300).split("\n")]
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    source, out = f"hf:{tmp_path / 'data'}", tmp_path / "out"
    expected, _ = prepare([source], tmp_path / "expected", vocab)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(writing, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        prepare([source], out, vocab, progress=StopsAfter(5))
    result, said = prepare([source], out, vocab)
    assert "continuing after" in said
    assert files_of(result.folder) == files_of(expected.folder)


def test_two_runs_never_write_one_folder(text, vocab, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(UserError, match="out is being written by"):
        prepare([text], tmp_path / "out", vocab)
    prepare([text], tmp_path / "out", vocab)
    assert not list(tmp_path.glob(".*"))


def test_workers_end_with_their_killed_parent(text, vocab, tmp_path):
    process = start([text] * 50, tmp_path / "out", vocab, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux")
    deadline = time.monotonic() + 30
    while len(pids := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2
    process.kill()
    process.communicate()
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_is_running(pid) for pid in pids)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_dead_worker_is_reported_not_waited_for(text, vocab, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "metro.modeling.text_metro_t5.normalize_text", lambda *_: signal.raise_signal(9)
    )
    with pytest.raises(UserError, match="a worker process died.*same command"):
        prepare([text], tmp_path / "out", vocab, num_workers=2)
