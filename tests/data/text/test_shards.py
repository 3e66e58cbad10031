"""A corpus in shards holds every document once, whoever prepares which of them."""

import gzip
import json
import shutil
from collections import Counter

import pytest

from metro.data.prepared_folder import shard_folders
from metro.data.text import reading, shards, writing
from metro.data.text.reading import open_sources
from metro.data.text.shards import first_document, names
from metro.utils.files import read_json
from metro.utils.messages import UserError
from tests.data.prepared import StopsAfter, files_of, items_of, prepare, random_text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two files that are cut, one of lines and one of records, and three that are not."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n\n" + random_text(1, 300), encoding="utf-8")
    records = [{"text": text} for text in random_text(2, 200).split("\n\n")]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "b.jsonl").write_text(lines.rstrip("\n"))
    for number in (3, 4):
        (folder / f"{number}.txt").write_text(random_text(number, 20), encoding="utf-8")
    (folder / "5.txt.gz").write_bytes(gzip.compress(random_text(5, 400).encode()))
    return folder


@pytest.fixture(autouse=True)
def small_files_are_cut(monkeypatch):
    monkeypatch.setattr(shards, "CUT_BYTES", 8000)


def documents_of(prefix) -> Counter:
    found, current = Counter(), []
    for item in [*items_of(prefix), [2]]:
        if len(item) > 1:
            current.append(tuple(item))
        elif current:
            found[tuple(current)] += 1
            current = []
    return found


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_document_is_in_one_shard(corpus, vocab, tmp_path, number):
    """Oracle: the corpus without shards."""
    whole, _ = prepare([corpus], tmp_path / "whole", vocab)
    made, _ = prepare([corpus], tmp_path / "out", vocab, shards=number, valid_fraction=0.2)
    folders = shard_folders(str(tmp_path / "out"))
    assert folders == [tmp_path / "out" / name for name in names(number)]
    assert [(folder / "valid.idx").exists() for folder in folders] == [True] + [False] * (
        number - 1
    )
    found = [documents_of(folder / "train") for folder in folders]
    assert sum(found, documents_of(folders[0] / "valid")) == documents_of(tmp_path / "whole/train")
    assert min(map(len, found)) > len(sum(found, Counter())) / number / 4
    counts, expected = made.manifest["counts"], whole.manifest["counts"]
    for name in ("lines", "vocab_size", "unknown_tokens"):
        assert counts[name] == expected[name]


@pytest.mark.parametrize(
    "name, content, starts",
    [
        ("a.txt", b"ab\n\nc\n \n\nd", [0, 4, 4, 4, 8, 8, 8, 9, 9, 10, 10]),
        ("a.txt", b"a \nb\n", [0, 5, 5, 5, 5, 5]),
        ("a.jsonl", b"{}\n{ }\n", [0, 3, 3, 3, 7, 7, 7, 7]),
    ],
)
def test_documents_begin_behind_empty_lines_and_records(
    tmp_path, monkeypatch, name, content, starts
):
    """Oracle: by hand, for every byte; lines are also read in pieces."""
    (tmp_path / name).write_bytes(content)
    (source,) = open_sources([str(tmp_path / name)])
    for piece in (100, 2):
        monkeypatch.setattr(shards, "CHUNK_BYTES", piece)
        assert [first_document(source, k) for k in range(len(content) + 1)] == starts


def test_machines_that_make_a_shard_each_make_the_same_corpus(corpus, tmp_path):
    """Oracle: one command that makes all, with the vocabulary that it trains."""
    settings = {"train_vocab": 150, "shards": 3, "valid_fraction": 0.1}
    whole, _ = prepare([corpus], tmp_path / "whole", None, **settings)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no sp.model in .*00000-of-00003 yet: make shard 0 first"):
        prepare([corpus], out, None, shard=2, **settings)
    for shard in (0, 2):
        prepare([corpus], out, None, shard=shard, **settings)
    with pytest.raises(UserError, match="are not finished or not listed: run the same"):
        shard_folders(str(out))
    made, said = prepare([corpus], out, None, **settings)
    assert said.count("already finished") == 2 and not made.was_finished
    assert made.manifest == whole.manifest == read_json(out / "prepare_text.json")
    assert files_of_all(out) == files_of_all(tmp_path / "whole")
    assert prepare([corpus], out, None, **settings)[0].was_finished
    alone, _ = prepare([corpus], tmp_path / "alone", None, train_vocab=150)
    assert (alone.folder / "sp.model").read_bytes() == (out / "sp.model").read_bytes()


def test_an_interrupted_shard_is_resumed_where_it_stopped(corpus, vocab, tmp_path, monkeypatch):
    """Oracle: a run that was left alone."""
    expected, _ = prepare([corpus], tmp_path / "expected", vocab, shards=2)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(writing, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "out", vocab, shards=2, shard=1, progress=StopsAfter(9))
    _, said = prepare([corpus], tmp_path / "out", vocab, shards=2, shard=1)
    assert "continuing after" in said
    prepare([corpus], tmp_path / "out", vocab, shards=2)
    assert files_of_all(tmp_path / "out") == files_of_all(tmp_path / "expected")


def files_of_all(out) -> list[dict[str, bytes]]:
    top = {name: (out / name).read_bytes() for name in ("sp.model", "dict.txt")}
    return [top, *map(files_of, shard_folders(str(out)))]


def test_shards_that_do_not_belong_together_are_refused(corpus, text, vocab, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    prepare([text], tmp_path / "vocab", None, train_vocab=151)
    prepare([corpus], out, vocab, shards=2)
    first, second = names(2)
    cases = [
        (dict(vocab=tmp_path / "vocab"), "vocab was 'sha256.* and is 'sha256"),
        (dict(vocab=vocab, cased=True), "lower was False and is True"),
    ]
    for settings, message in cases:
        prepare([corpus], other, shards=2, shard=1, overwrite=True, **settings)
        shutil.rmtree(out / second)
        shutil.copytree(other / second, out / second)
        with pytest.raises(UserError, match=f"{second}.*{message}"):
            prepare([corpus], out, vocab, shards=2)
        with pytest.raises(UserError, match="00001-of-00002.*run the same"):
            shard_folders(str(out))
    shutil.rmtree(out / second)
    shutil.copytree(out / first, out / second)  # one twice
    with pytest.raises(UserError, match=f"{second} is finished.* input"):
        prepare([corpus], out, vocab, shards=2)
    prepare([corpus], out, vocab, shards=2, overwrite=True)
    assert len(shard_folders(str(out))) == 2
    for number in (None, 3):
        with pytest.raises(UserError, match="out holds a corpus in 0000.*choose another --out"):
            prepare([corpus], out, vocab, shards=number, overwrite=True)


def test_what_cannot_be_cut_so_often_is_said(corpus, vocab, tmp_path):
    with pytest.raises(UserError, match="nothing is left for shard 2 of 3: use fewer shards"):
        prepare([corpus / "3.txt", corpus / "5.txt.gz"], tmp_path / "out", vocab, shards=3)
    with pytest.raises(UserError, match="shard is 3 and shards is 3: use shards N"):
        prepare([corpus], tmp_path / "new", vocab, shards=3, shard=3)
    text = (corpus / "a.txt").read_bytes()
    middle = first_document(open_sources([str(corpus / "a.txt")])[0], len(text) // 2)
    (tmp_path / "bad.txt").write_bytes(text[:middle] + b"b\xffd\n\n" + text[middle:])
    made, said = prepare([tmp_path / "bad.txt"], tmp_path / "bad", vocab, shards=2)
    assert f"bad.txt (from byte {middle:,}):1: not valid UTF-8" in said
