"""Text becomes the bytes that fairseq-preprocess writes, whatever the workers, chunks and kills."""

import builtins
import gzip
import importlib.util
import json
import os
import shutil
import sys

import numpy as np
import pytest

from benchmarks.plain_chain import normalize_plainly
from metro.data.text import reading
from metro.data.text.writing import is_validation_document
from metro.modeling.text_metro_t5 import Vocabulary
from metro.utils.files import read_json
from metro.utils.messages import UserError
from tests.data.prepared import ALL_FILES, files_of, items_of, prepare, random_text
from tests.processes import run_python


@pytest.mark.fairseq
def test_bytes_equal_fairseq_preprocess_on_the_same_lines(text, vocab, tmp_path):
    """Oracle: fairseq-preprocess on pieces made by the plain normaliser and SentencePiece."""
    processor = Vocabulary.from_folder(vocab).processor
    hard = (
        "plain\r\n\r\n \t \n''x'' ´y´\u200b\n日本 ☃☃ x\n[MASK] a[MASK]b <s>\n\x01\nlast, no newline"
    )
    (tmp_path / "hard.txt").write_bytes(hard.encode())
    with (tmp_path / "pieces.txt").open("w", encoding="utf-8") as pieces:
        for line in [*text.read_text(encoding="utf-8").split("\n")[:-1], "", *hard.split("\n")]:
            pieces.write(" ".join(processor.encode(normalize_plainly(line, True), out_type=str)))
            pieces.write("\n")
    command = ["-m", "fairseq_cli.preprocess", "--only-source", "--workers", "1"]
    command += ["--srcdict", vocab / "dict.txt", "--trainpref", tmp_path / "pieces.txt"]
    run_python(*command, "--destdir", tmp_path / "theirs")
    # The first file must not end with an empty line: then a boundary is added between the two.
    assert not text.read_text(encoding="utf-8").endswith("\n\n")
    prepare([text, tmp_path / "hard.txt"], tmp_path / "ours", vocab)
    for name in ("train.bin", "train.idx", "dict.txt"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


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
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk_bytes)
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
    with pytest.raises(ImportError, match="needs the package datasets: pip install"):
        prepare(["hf:anything"], tmp_path / "out2", vocab)


@pytest.mark.parametrize("where", ["load", "iterate"])
@pytest.mark.parametrize("kind", ["DatasetsError", "RuntimeError", "ConnectionError"])
def test_errors_of_the_hub_are_one_line(vocab, tmp_path, monkeypatch, where, kind):
    """Before and while records are read."""
    package = pytest.importorskip("datasets")
    error = getattr(package.exceptions, kind, None) or getattr(builtins, kind)

    class Rows:
        def skip(self, count):
            yield {"text": "one"}
            raise error("scripts are no\nlonger supported")

    def load_dataset(*args, **kwargs):
        if where == "load":
            raise error("scripts are no\nlonger supported")
        return Rows()

    monkeypatch.setattr(package, "load_dataset", load_dataset)
    message = f"^cannot read hf:some/thing: {kind}: scripts are no longer supported; without a net"
    with pytest.raises(UserError, match=message):
        prepare(["hf:some/thing"], tmp_path / "out", vocab)


@pytest.mark.parametrize("content", ["{}", "[]", '{"settings": {}, "files": []}'])
@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_manifest_of_something_else_is_named(text, vocab, tmp_path, name, content):
    (tmp_path / name).mkdir()
    manifest = tmp_path / name / "prepare_text.json"
    manifest.write_text(content)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{manifest} is not what `.*prepare-text` writes"):
            prepare([text], tmp_path / "out", vocab, overwrite=overwrite)
        assert manifest.read_text() == content


def test_unusable_lines_are_skipped_counted_and_named(vocab, tmp_path, monkeypatch):
    """Oracle: the same inputs without those lines."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 64)
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 500)
    long = b"x" * 501
    bad = [b"good", b"b\xffd", b"", long, b"a\0b", b"also \xe2\x82", b"y" * 500, b"end", long]
    (tmp_path / "bad.txt").write_bytes(b"\n".join(bad))
    records = [b'{"text": "fine"}', b"{oops", b'{"body": 1}', b'"text"', b'{"text": "\\ud800"}']
    records += [b'{"text": "nul \\u0000"}', long, b"\xff", b'{"text": "too"}']
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
        "half a character (lone surrogate)": 1,
        "a NUL character": 2,
    }
    places = ["bad.txt:2: not valid UTF-8", "bad.txt:4: longer", "bad.txt:9: longer"]
    places += ["jsonl:2: not JSON", "jsonl:3: no string", "jsonl:5: half a"]
    assert all(place in said for place in places)


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
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "wide.txt").write_text("text", encoding="utf-16")
    (tmp_path / "nothing").mkdir()
    out = tmp_path / "out"
    cases = [
        ([tmp_path / "nowhere.txt", text], {}, UserError, "no such input file: .*nowhere"),
        ([tmp_path / "nothing"], {}, UserError, "the folder .*nothing has no files"),
        ([tmp_path / "*.tex"], {}, UserError, "no such input file: .*\\*.tex"),
        ([vocab], {}, UserError, "made it of text"),
        ([tmp_path / "rows.parquet"], {}, ValueError, "rows.parquet is not text"),
        ([tmp_path / "wide.txt"], {}, ValueError, "wide.txt is UTF-16"),
        ([], {}, ValueError, "no input"),
        ([tmp_path / "empty.txt"], {}, ValueError, "no text in the input .*all files are empty"),
        ([tmp_path / "blank.txt"], {}, ValueError, "no text in the input"),
        ([tmp_path / "cut.txt.gz"], {"overwrite": True}, ValueError, "not a complete gzip file"),
        ([text], {"valid_fraction": 1.0, "overwrite": True}, ValueError, "valid_fraction is 1.0"),
        ([text], {"train_vocab": 100}, ValueError, "either vocab DIR or train_vocab N"),
        ([text], {"vocab": None, "train_vocab": 0}, ValueError, "train_vocab is 0; use 6"),
    ]
    for inputs, settings, error, message in cases:
        with pytest.raises(error, match=message):
            prepare(inputs, out, **{"vocab": vocab, **settings})
        assert not out.exists()
    _, said = prepare([tmp_path / "empty.txt", text], out, vocab, overwrite=True)
    assert "warning: " in said and "empty.txt is empty" in said


def test_folders_and_patterns_are_the_files_in_them(vocab, tmp_path, monkeypatch):
    """Oracle: the same files named one by one, in the order of their names."""
    files = ["a/2.txt", "b.txt", "z/1.txt"]
    for number, name in enumerate([*files, ".hidden.txt"]):
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(random_text(number, 20))
    monkeypatch.chdir(tmp_path)
    prepare([f"books/{name}" for name in files], tmp_path / "named", vocab)
    for given in ("books", "books/**/*.txt"):
        _, said = prepare([given], tmp_path / "out", vocab, overwrite=True)
        assert said.startswith("reading books/a/2.txt, books/b.txt, books/z/1.txt")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "named")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prepare(["../books/[ab]*/*", "../books/b.txt", "../books/z"], tmp_path / "up", vocab)
    assert files_of(tmp_path / "up") == files_of(tmp_path / "named")


def test_inputs_are_known_by_their_content(text, vocab, tmp_path):
    """Oracle: a file edited in place keeps its size and time; a touched one keeps its content."""
    (tmp_path / "in.txt").write_bytes(text.read_bytes())
    first, _ = prepare([tmp_path / "in.txt"], tmp_path / "out", vocab)
    written = (tmp_path / "in.txt").stat().st_mtime_ns
    os.utime(tmp_path / "in.txt", ns=(0, 0))
    assert prepare([tmp_path / "in.txt"], tmp_path / "out", vocab)[0].was_finished
    (tmp_path / "in.txt").write_bytes(text.read_bytes().replace(b"e", b"o"))
    os.utime(tmp_path / "in.txt", ns=(written, written))
    with pytest.raises(UserError, match="changed on disk: .*in.txt.*--overwrite"):
        prepare([tmp_path / "in.txt"], tmp_path / "out", vocab)


def test_finished_folder_is_left_alone_and_other_settings_need_overwrite(text, vocab, tmp_path):
    out = tmp_path / "out"
    prepare([text], out, vocab)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again, said = prepare([text], out, vocab, num_workers=2)
    assert again.was_finished and "already finished" in said
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match="lower was True and is False.*--overwrite"):
        prepare([text], out, vocab, cased=True)
    (out / "notes.md").write_text("mine")
    prepare([text], out, vocab, cased=True, valid_fraction=0.2, overwrite=True)
    assert {path.name for path in out.iterdir()} == {*ALL_FILES, "prepare_text.json", "notes.md"}
    assert not out.with_name("out.partial").exists()
    (out / "train.bin").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="train.bin is missing or was changed"):
        prepare([text], out, vocab)


def test_overwrite_leaves_no_stale_split_and_every_folder_of_the_user(text, vocab, tmp_path):
    out = tmp_path / "out"
    for manifest in (True, False):  # without one: a folder of fairseq-preprocess
        prepare([text], out, vocab, valid_fraction=0.2)
        (out / "mine/logs").mkdir(parents=True)
        if not manifest:
            (out / "prepare_text.json").unlink()
        prepare([text], out, vocab, valid_fraction=0.0, overwrite=True)
        files = {path.relative_to(out).as_posix() for path in out.rglob("*")}
        kept = {name for name in ALL_FILES if not name.startswith("valid")}
        assert files == {*kept, "prepare_text.json", "mine", "mine/logs"}
        shutil.rmtree(out)


def test_folder_of_other_things_is_not_touched(text, vocab, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        prepare([text], tmp_path / "out", vocab)
    with pytest.raises(UserError, match="thesis.tex exists and is not empty"):
        prepare([text], tmp_path / "out/thesis.tex", vocab, overwrite=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files .thesis.tex"):
        prepare([text], tmp_path / "new", vocab)
    assert (tmp_path / "new.partial/thesis.tex").exists()


@pytest.mark.parametrize("name", ["../thesis.tex", "/{folder}/thesis.tex", "link/thesis.tex"])
def test_names_in_a_manifest_stay_in_the_folder(text, vocab, tmp_path, name):
    """Oracle: a file beside the output, named by a manifest that somebody else wrote."""
    out = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        (folder / "thesis.tex").write_text("years of work")
    prepare([text], out, vocab)
    (out / "link").symlink_to(tmp_path / "elsewhere")
    manifest = read_json(out / "prepare_text.json")
    manifest["files"][name.format(folder=tmp_path)] = {"bytes": 13, "crc32": ""}
    (out / "prepare_text.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leads out of|takes out of"):
        prepare([text], out, vocab, valid_fraction=0.1, overwrite=True)
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "elsewhere/thesis.tex").exists()


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
