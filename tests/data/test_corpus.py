"""Text becomes the bytes that fairseq-preprocess writes, whatever the workers, chunks and kills."""

import gzip
import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plain_chain import normalize_plainly
from metro.data import preparation, text_input
from metro.data.corpus import prepare_text
from metro.data.indexed_file import IndexedFileWriter, WritePosition
from metro.data.preparation import is_validation_document
from metro.modeling.text_metro_t5 import Vocabulary

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


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(0, 3000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def vocab(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vocab") / "vocab"
    return prepare_text([text], folder, train_vocab=150, num_workers=1, say=silent).folder


def silent(line: str) -> None:
    pass


def prepare(inputs, out, vocab, **settings):
    """With defaults that make a test quick, and what the user was told."""
    said = []
    settings = {"num_workers": 1, "valid_fraction": 0, **settings}
    result = prepare_text([*map(str, inputs)], out, vocab=vocab, say=said.append, **settings)
    return result, "\n".join(said)


def files_of(folder: Path) -> dict[str, bytes]:
    """The output, without the manifest (which holds times of the input files)."""
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


def test_bytes_equal_fairseq_preprocess_on_the_same_lines(text, vocab, tmp_path):
    """Oracle: fairseq-preprocess on pieces made by the plain normaliser and SentencePiece."""
    if importlib.util.find_spec("fairseq") is None:
        pytest.skip("fairseq is not installed")
    processor = Vocabulary.from_folder(vocab).processor
    hard = (
        "plain\r\n\r\n \t \n''x'' ´y´\u200b\n日本 ☃☃ x\n[MASK] a[MASK]b <s>\n\x01\nlast, no newline"
    )
    (tmp_path / "hard.txt").write_bytes(hard.encode())
    with (tmp_path / "pieces.txt").open("w", encoding="utf-8") as pieces:
        for line in [*text.read_text(encoding="utf-8").split("\n")[:-1], "", *hard.split("\n")]:
            pieces.write(" ".join(processor.encode(normalize_plainly(line, True), out_type=str)))
            pieces.write("\n")
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--workers", "1"]
    command += ["--srcdict", vocab / "dict.txt", "--trainpref", tmp_path / "pieces.txt"]
    subprocess.run([*command, "--destdir", tmp_path / "theirs"], check=True, capture_output=True)
    # The first file must not end with an empty line: then a boundary is added between the two.
    assert not text.read_text(encoding="utf-8").endswith("\n\n")
    prepare([text, tmp_path / "hard.txt"], tmp_path / "ours", vocab)
    for name in ("train.bin", "train.idx", "dict.txt"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_writer_reproduces_recorded_files(testdata, tmp_path):
    """Oracle: fairseq's own files; written in two parts with a crash's leftovers between them."""
    prefix = testdata / "golden/wiki2tiny-bin/train"
    items = items_of(prefix)
    sizes = np.array([*map(len, items)], np.int32)
    ids = np.concatenate(items).astype(np.uint16)
    half, split = 1000, int(sizes[:1000].sum())
    writer = IndexedFileWriter(tmp_path / "train", np.uint16)
    writer.append(ids[:split], sizes[:half])
    position = writer.position
    writer.append(ids[:77], np.array([77]))
    writer.close()
    writer = IndexedFileWriter(tmp_path / "train", np.uint16, WritePosition(*position))
    writer.append(ids[split:], sizes[half:])
    writer.finish()
    for suffix in (".bin", ".idx"):
        written = (tmp_path / "train").with_suffix(suffix).read_bytes()
        assert written == prefix.with_suffix(suffix).read_bytes()


def test_index_of_items_beyond_four_gigabytes_has_exact_offsets(tmp_path, monkeypatch):
    """Oracle: offsets are sums of sizes; the data file is sparse."""
    monkeypatch.setattr("metro.data.indexed_file._ITEMS_AT_ONCE", 2)
    sizes = np.array([1_500_000_000, 3, 2_000_000_000, 5, 7], np.int32)
    (tmp_path / "big.sizes").write_bytes(sizes.tobytes())
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(2 * int(sizes.sum(dtype=np.int64)))
    position = WritePosition(5, int(sizes.sum(dtype=np.int64)))
    IndexedFileWriter(tmp_path / "big", np.uint16, position).finish()
    starts = np.frombuffer((tmp_path / "big.idx").read_bytes(), "<i8", 5, 26 + 20)
    assert starts.tolist() == [0, 3_000_000_000, 3_000_000_006, 7_000_000_006, 7_000_000_016]


@pytest.mark.parametrize(
    "num_bytes, workers, chunk_bytes",
    [(None, 3, 1000), (None, 2, 77), (None, 2, 1 << 20), (3000, 1, 1)],
)
def test_workers_and_chunks_never_change_the_output(
    text, vocab, tmp_path, monkeypatch, num_bytes, workers, chunk_bytes
):
    """Oracle: one process that reads all at once."""
    source = tmp_path / "source.txt"
    source.write_bytes(text.read_bytes()[:num_bytes])
    expected, _ = prepare([source, source], tmp_path / "one", vocab, valid_fraction=0.1)
    assert expected.manifest["counts"]["valid_items"] > 0
    monkeypatch.setattr(text_input, "CHUNK_BYTES", chunk_bytes)
    settings = {"num_workers": workers, "valid_fraction": 0.1}
    result, _ = prepare([source, source], tmp_path / "out", vocab, **settings)
    assert files_of(result.folder) == files_of(expected.folder)
    assert result.manifest == expected.manifest


def test_whole_documents_are_set_aside_and_nothing_is_lost(text, vocab, tmp_path):
    """Oracle: the unsplit output, cut into documents here."""
    prepare([text], tmp_path / "all", vocab)
    prepare([text], tmp_path / "split", vocab, valid_fraction=0.2)
    documents, current = [], []
    for item in items_of(tmp_path / "all/train"):
        if len(item) > 1 and current and len(current[-1]) == 1 and any(len(i) > 1 for i in current):
            documents.append(current)
            current = []
        current.append(item)
    documents.append(current)
    chosen = is_validation_document(np.arange(len(documents)), 0.2)
    for split, is_member in (("train", ~chosen), ("valid", chosen)):
        members = [doc for doc, member in zip(documents, is_member, strict=True) if member]
        assert items_of(tmp_path / "split" / split) == [item for doc in members for item in doc]
    assert 0.1 < chosen.mean() < 0.3


def test_drawn_share_of_documents_is_the_asked_one():
    """Oracle: a binomial draw stays within five standard deviations."""
    for fraction in (0.005, 0.1, 0.5):
        drawn = is_validation_document(np.arange(200_000), fraction)
        assert abs(drawn.mean() - fraction) < 5 * (fraction * (1 - fraction) / 200_000) ** 0.5
        assert not drawn[0]


@pytest.mark.parametrize(
    "content, train, valid, note",
    [
        ("a\nb\n\nc\nd\n\n", ["a", "b", ""], ["c", "d", ""], "it is the last document"),
        ("a\nb\nc\n", ["a", "b"], ["c"], "one document"),
        ("a\n", ["a"], ["a"], "single line"),
    ],
)
def test_few_documents_still_give_both_splits(vocab, tmp_path, content, train, valid, note):
    """Oracle: by hand."""
    (tmp_path / "few.txt").write_text(content)
    _, said = prepare([tmp_path / "few.txt"], tmp_path / "out", vocab, valid_fraction=0.001)
    assert note in said
    vocabulary = Vocabulary.from_folder(vocab)
    for split, lines in (("train", train), ("valid", valid)):
        expected = [vocabulary.encode(line, True) for line in lines]
        assert items_of(tmp_path / "out" / split) == expected


def test_jsonl_gz_and_datasets_equal_the_same_documents_as_text(vocab, tmp_path):
    """Oracle: plain text with an empty line after each document."""
    records = ["One line.", "Two\n\n  \nlines\r\n", "", "“Last”\n"]
    plain = "One line.\n\nTwo\nlines\n\n“Last”\n\n"
    lines = "".join(json.dumps({"text": record, "id": 3}) + "\n" for record in records)
    (tmp_path / "a.txt").write_text(plain, encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.txt.gz").write_bytes(
        gzip.compress(plain[:20].encode()) + gzip.compress(plain[20:].encode())
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    inputs = ["a.jsonl", "a.txt.gz", "a.jsonl.gz"]
    if importlib.util.find_spec("datasets"):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/train.jsonl").write_text(lines)
        inputs.append(f"hf:{tmp_path / 'data'}")
    prepare([tmp_path / "a.txt"], tmp_path / "expected", vocab)
    for number, name in enumerate(inputs):
        source = name if name.startswith("hf:") else tmp_path / name
        result, _ = prepare([source], tmp_path / f"out{number}", vocab)
        assert files_of(result.folder) == files_of(tmp_path / "expected"), name


def test_datasets_without_the_package_or_the_field_say_what_to_do(vocab, tmp_path, monkeypatch):
    if importlib.util.find_spec("datasets"):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/train.jsonl").write_text('{"body": "x"}\n')
        with pytest.raises(ValueError, match=r"no string field 'text'; its fields are \['body'\]"):
            prepare([f"hf:{tmp_path / 'data'}"], tmp_path / "out", vocab)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'metro\[train\]'"):
        prepare(["hf:anything"], tmp_path / "out2", vocab)


def test_unusable_lines_are_skipped_counted_and_named(vocab, tmp_path, monkeypatch):
    """Oracle: the same inputs without those lines."""
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 64)
    monkeypatch.setattr(text_input, "MAX_LINE_BYTES", 500)
    long = b"x" * 501
    bad = [b"good", b"b\xffd", b"", long, b"also \xe2\x82", b"y" * 500, b"end", long]
    (tmp_path / "bad.txt").write_bytes(b"\n".join(bad))
    records = [
        b'{"text": "fine"}',
        b"{oops",
        b'{"body": 1}',
        b'"text"',
        b'{"text": "\\ud800"}',
        long,
        b"\xff",
        b'{"text": "too"}',
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(records) + b"\n")
    (tmp_path / "good.txt").write_bytes(b"\n".join([b"good", b"", b"y" * 500, b"end"]))
    (tmp_path / "good.jsonl").write_bytes(b"\n".join([records[0], records[-1]]))
    result, said = prepare([tmp_path / "bad.txt", tmp_path / "bad.jsonl"], tmp_path / "out", vocab)
    expected, _ = prepare(
        [tmp_path / "good.txt", tmp_path / "good.jsonl"], tmp_path / "expected", vocab
    )
    assert files_of(result.folder) == files_of(expected.folder)
    assert result.manifest["skipped"] == {
        "longer than 500 bytes": 3,
        "not JSON": 1,
        "no string field 'text'": 2,
        "not valid UTF-8": 3,
        "not valid Unicode (lone surrogate)": 1,
    }
    for place in ("bad.txt:2: not valid UTF-8", "bad.txt:4: longer", "bad.txt:8: longer"):
        assert place in said
    for place in (
        "jsonl:2: not JSON",
        "jsonl:3: no string",
        "jsonl:5: not valid",
        "jsonl:6: longer",
    ):
        assert place in said


def test_line_of_ten_megabytes_is_one_item(vocab, tmp_path):
    """Oracle: SentencePiece on the whole line."""
    line = ("the sun shone (hotly), didn't it? " * 300_000)[:10_000_000]
    (tmp_path / "long.txt").write_text(f"before\n{line}\nafter\n")
    prepare([tmp_path / "long.txt"], tmp_path / "out", vocab, num_workers=2)
    vocabulary = Vocabulary.from_folder(vocab)
    expected = [vocabulary.encode(text, True) for text in ("before", line, "after")]
    assert items_of(tmp_path / "out/train") == expected


def test_bad_input_is_refused_with_its_name(text, vocab, tmp_path):
    for name in ("empty.txt", "blank.txt"):
        (tmp_path / name).write_text("" if name == "empty.txt" else "\n \n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(random_text(5, 50).encode())[:-20])
    out = tmp_path / "out"
    cases = [
        ([tmp_path / "nowhere.txt", text], {}, FileNotFoundError, "no such input file: .*nowhere"),
        ([tmp_path], {}, ValueError, "is a folder"),
        ([], {}, ValueError, "no input"),
        ([tmp_path / "empty.txt"], {}, ValueError, "no text in the input .*all files are empty"),
        ([tmp_path / "blank.txt"], {}, ValueError, "no text in the input"),
        ([tmp_path / "cut.txt.gz"], {"overwrite": True}, ValueError, "not a complete gzip file"),
        ([text], {"valid_fraction": 1.0, "overwrite": True}, ValueError, "--valid-fraction is 1.0"),
        ([text], {"num_workers": 0, "overwrite": True}, ValueError, "--workers is 0"),
        ([text], {"train_vocab": 100}, ValueError, "either --vocab DIR or --train-vocab N"),
    ]
    for inputs, settings, error, message in cases:
        with pytest.raises(error, match=message):
            prepare(inputs, out, vocab, **settings)
        assert not out.exists()
    _, said = prepare([tmp_path / "empty.txt", text], out, vocab, overwrite=True)
    assert "warning: " in said and "empty.txt is empty" in said


def test_finished_folder_is_left_alone_and_other_settings_need_overwrite(text, vocab, tmp_path):
    out = tmp_path / "out"
    prepare([text], out, vocab)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again, said = prepare([text], out, vocab, num_workers=2)
    assert again.was_finished and "already finished" in said
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match="lower was True and is False.*--overwrite"):
        prepare([text], out, vocab, lower=False)
    (out / "notes.md").write_text("mine")
    prepare([text], out, vocab, lower=False, valid_fraction=0.2, overwrite=True)
    assert {path.name for path in out.iterdir()} == {*ALL_FILES, "prepare_text.json", "notes.md"}
    assert not out.with_name("out.partial").exists()
    (out / "train.bin").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="train.bin is missing or was changed"):
        prepare([text], out, vocab)


def test_folder_of_other_things_is_not_touched(text, vocab, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        prepare([text], tmp_path / "out", vocab)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files .thesis.tex"):
        prepare([text], tmp_path / "new", vocab)
    assert (tmp_path / "new.partial/thesis.tex").exists()


RUN = """
import sys
from metro.data import preparation, text_input
from metro.data.corpus import prepare_text
text_input.CHUNK_BYTES, preparation.CHECKPOINT_SECONDS = 2000, 0
vocab, out, workers, *inputs = sys.argv[1:]
prepare_text(inputs, out, vocab=vocab, num_workers=int(workers), valid_fraction=0.1)
"""


def start(inputs, out, vocab, workers) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, vocab, out, workers, *inputs]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(text, vocab, tmp_path, workers):
    """Oracle: the same command left alone."""
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(random_text(1, 1500).encode()))
    inputs = [text, tmp_path / "b.txt.gz"]
    expected, _ = prepare(inputs, tmp_path / "expected", vocab, valid_fraction=0.1)
    out, state = tmp_path / "out", tmp_path / "out.partial/state.json"
    rng, seen, resumed = random.Random(), [], 0
    for attempt in range(20):
        process = start(inputs, out, vocab, workers)
        if attempt < 6:
            before = state.read_bytes() if state.exists() else None
            while process.poll() is None:
                if state.exists() and state.read_bytes() != before:
                    time.sleep(rng.random() * 0.15)
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
        said, _ = process.communicate(timeout=60)
        resumed += "continuing after" in said
        if process.returncode == 0:
            break
        assert not out.exists()
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
    prepare([few], out, vocab, lower=False)  # so that the end has to replace an earlier output

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
        prepare([few], out, vocab, lower=False, overwrite=True)
    assert steps > 20


def stop_after(num_calls: int):
    """A progress callback that interrupts after so many calls."""
    calls = []

    def progress(now):
        calls.append(now)
        if len(calls) > num_calls:
            raise KeyboardInterrupt

    return progress


def test_resuming_with_other_settings_or_changed_input_is_refused(vocab, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(random_text(2, 500), encoding="utf-8")
    out = tmp_path / "out"
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(preparation, "CHECKPOINT_SECONDS", 0)

    with pytest.raises(KeyboardInterrupt):
        prepare([text], out, vocab, progress=stop_after(num_calls=5))
    with pytest.raises(
        ValueError, match="unfinished run that differs: lower was True and is False"
    ):
        prepare([text], out, vocab, lower=False)
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
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(preparation, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        prepare([source], out, vocab, progress=stop_after(num_calls=5))
    result, said = prepare([source], out, vocab)
    assert "continuing after" in said
    assert files_of(result.folder) == files_of(expected.folder)


def test_two_runs_never_write_one_folder(text, vocab, tmp_path, monkeypatch):
    from metro.data import prepared_folder

    monkeypatch.setattr(prepared_folder, "LOCK_SECONDS", 0.2)
    folder = prepared_folder.PreparedFolder(tmp_path / "out", {})
    folder.open(overwrite=False)
    with pytest.raises(ValueError, match="another process is preparing"):
        prepare([text], tmp_path / "out", vocab)


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
        "metro.data.text_encoding.normalize_text", lambda *_: signal.raise_signal(9)
    )
    with pytest.raises(RuntimeError, match="a worker process died.*same command"):
        prepare([text], tmp_path / "out", vocab, num_workers=2)


@pytest.mark.parametrize("lower", [True, False])
def test_trained_vocabulary_has_the_published_layout_and_is_the_same_each_time(
    text, tmp_path, lower
):
    """Oracle: the layout of the published sp.model files."""
    for name, workers in (("a", 1), ("b", 2)):
        prepare_text(
            [text], tmp_path / name, train_vocab=200, lower=lower, num_workers=workers, say=silent
        )
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    vocabulary = Vocabulary.from_folder(tmp_path / "a")
    processor = vocabulary.processor
    assert len(vocabulary) == 200
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    assert processor.id_to_piece(list(range(5))) == special
    assert processor.encode("a[MASK]")[-1] == 4
    assert (vocabulary.encode("ÉTA", lower) == vocabulary.encode("éta", lower)) == lower


def test_vocabulary_size_that_the_text_cannot_fill_is_refused(tmp_path):
    (tmp_path / "small.txt").write_text("some few words\n")
    with pytest.raises(
        ValueError, match=r"vocabulary of 5000 pieces on 3 distinct words: the largest"
    ):
        prepare_text([tmp_path / "small.txt"], tmp_path / "out", train_vocab=5000, num_workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["small.txt"]


def test_command_writes_a_folder_and_says_what_is_in_it(text, vocab, tmp_path):
    command = [sys.executable, "-m", "metro.cli.main", "prepare-text", "--vocab", str(vocab)]
    command += ["--workers", "1", "--out", str(tmp_path / "out"), "--input", str(text), str(text)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "documents; train" in run.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*ALL_FILES, "prepare_text.json"}
    run = subprocess.run([*command, "nowhere.txt", "--overwrite"], capture_output=True, text=True)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "no such input file: nowhere.txt" in run.stderr


@pytest.mark.slow
def test_memory_stays_flat_as_the_input_grows(text, vocab, tmp_path):
    """Ten times the input takes less than a tenth more memory, all processes counted."""
    from benchmarks.prepare_text import METRO, run_measured

    content, peaks = text.read_bytes() * 40, []
    for times in (1, 10):
        path = tmp_path / f"{times}.txt"
        with path.open("wb") as file:
            for _ in range(times):
                file.write(content)
        command = [*METRO, "--out", tmp_path / f"out{times}", "--vocab", vocab, "--workers", 2]
        peaks.append(run_measured([*command, "--input", path])[1])
    assert peaks[1] < 1.1 * peaks[0] + 10, peaks
