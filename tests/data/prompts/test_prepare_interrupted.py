"""Interrupted and repeated preparations end with the bytes of one that was left alone."""

import os
import subprocess
import sys

import pytest

from metro.data.prompts import prepare as prepare_module
from metro.data.prompts.stored import read_manifest
from metro.utils.messages import UserError
from tests.data.prepared import Said, kill_after_next_save
from tests.data.prompts.toys import files_of, make_world, prepare

RUN = """
import sys
from metro.data.prompts import prepare as prepare_module
from tests.data.prepared import Said
from tests.data.prompts.toys import prepare
from pathlib import Path
prepare_module.CHUNK_EXAMPLES, prepare_module.CHECKPOINT_SECONDS = 40, 0
world, out, workers, vocab = sys.argv[1:]
options = {"vocab": vocab} if vocab else {}
print(prepare(Path(world), Path(out), num_workers=int(workers), **options)[1])
"""


@pytest.mark.parametrize(("workers", "format"), [(1, "jsonl"), (2, "fairseq")])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(
    world, vocab, tmp_path, workers, format
):
    """Oracle: the same command left alone."""
    options = {"vocab": vocab} if format == "fairseq" else {}
    expected, _ = prepare(world, tmp_path / "expected", **options)
    out, state = tmp_path / "out", tmp_path / "out.partial/state.json"
    command = [sys.executable, "-c", RUN, world, out, workers, options.get("vocab", "")]
    resumed, kills = 0, 0
    for attempt in range(12):
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        if attempt < 3:
            kills += kill_after_next_save(process, state, 0.1)
        said, _ = process.communicate(timeout=60)
        resumed += "continuing after" in said
        if process.returncode == 0:
            break
        assert not out.exists()
    print(f"{kills} kills, {resumed} continued")
    assert resumed >= 1 and files_of(out) == files_of(expected.folder)
    assert not out.with_name("out.partial").exists()


def test_finished_output_is_left_alone_and_other_settings_are_refused(world, tmp_path):
    out = tmp_path / "out"
    first, _ = prepare(world, out)
    first_files = files_of(first.folder)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again, said = prepare(world, out)
    assert again.was_finished and "already finished" in said[0]
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match="seed was 0 and is 1.*--overwrite"):
        prepare(world, out, seed=1)
    other, _ = prepare(world, out, seed=1, overwrite=True)
    other_files = files_of(other.folder)
    assert other_files != first_files and read_manifest(out)["seed"] == 1
    (out / "train/one_ask/train.jsonl").write_text("")
    for folder in ("mine", "train/one_old"):
        (out / folder).mkdir()
    with pytest.raises(ValueError, match="missing or was changed.*--overwrite"):
        prepare(world, out, seed=1)
    again, _ = prepare(world, out, seed=1, overwrite=True)
    assert files_of(again.folder) == other_files
    assert (out / "mine").is_dir() and (out / "train/one_old").is_dir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes").write_text("mine")
    with pytest.raises(UserError, match="choose another --out"):
        prepare(world, tmp_path / "taken")


def test_data_that_changed_during_an_interruption_is_refused(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    monkeypatch.setattr(prepare_module, "CHUNK_EXAMPLES", 30)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0)

    class Stops(Said):
        def show(self, step, done, total=None, note=""):
            if int(note.split(", ")[1].split()[0]) > 200:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(world, tmp_path / "out", progress=Stops())
    file = world / "data/one/default/train.jsonl"
    rows, before = file.read_bytes(), file.stat()
    file.write_bytes(rows + b'{"text": "more", "label": 0}\n')
    with pytest.raises(ValueError, match="unfinished run that differs: data_files was .* and is"):
        prepare(world, tmp_path / "out")
    file.write_bytes(rows)
    result, said = prepare(world, tmp_path / "out")
    assert "continuing after 0 of 4 parts" in said[0]
    expected, _ = prepare(world, tmp_path / "expected")
    assert files_of(result.folder) == files_of(expected.folder)
    file.write_bytes(rows.replace(b"drei", b"four"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(ValueError, match="other settings: data_files was"):
        prepare(world, tmp_path / "out")
