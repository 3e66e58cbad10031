"""Folders and files are complete or absent, and what exists is kept."""

import re

import pytest

from metro.utils.files import _exchange, new_file, new_folder, read_json, read_yaml, write_json
from metro.utils.messages import UserError
from tests.processes import run_python


def write_folder(out, text, **options):
    with new_folder(out, **options) as folder:
        (folder / "a").write_text(text)


def write_file(out, text, **options):
    with new_file(out, **options) as temporary:
        temporary.write_text(text)


def content(out) -> str:
    return (out / "a" if out.is_dir() else out).read_text()


@pytest.mark.parametrize("write", [write_folder, write_file])
def test_an_output_is_complete_or_absent(tmp_path, write):
    """Oracle: the names in the parent folder, after an error and after success."""
    out = tmp_path / "parent/out"
    with pytest.raises(RuntimeError), (new_folder if write is write_folder else new_file)(out):
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    write(out, "old")
    with pytest.raises(UserError, match="out exists.*--overwrite"):
        write(out, "new")
    assert content(out) == "old"
    write(out, "new", overwrite=True)
    assert content(out) == "new" and [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("write", [write_folder, write_file])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, write):
    """Oracle: the target of the link, twice: the first must leave nothing for the second."""
    write(tmp_path / "v1", "old")
    (tmp_path / "latest").symlink_to("v1")
    for text in ("new", "newer"):
        with pytest.raises(UserError, match="latest exists"):
            write(tmp_path / "latest", text)
        write(tmp_path / "latest", text, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "v1"]
        assert (tmp_path / "latest").is_symlink() and content(tmp_path / "v1") == text


def test_overwriting_deletes_no_more_than_an_export(tmp_path, monkeypatch):
    """A folder with folders in it, the working directory, inputs: kept."""
    source = tmp_path / "project/src"
    source.mkdir(parents=True)
    (source / "input").write_text("kept")
    with pytest.raises(UserError, match="the folder src is in it"):
        write_folder(tmp_path / "project", "new", overwrite=True)
    with pytest.raises(UserError, match="input is in it"):
        write_folder(source, "new", overwrite=True, inputs=(source / "input",))
    with pytest.raises(UserError, match="is an input of this command"):
        write_file(source / "input", "new", overwrite=True, inputs=(source / "input",))
    monkeypatch.chdir(source)
    with pytest.raises(UserError, match="is in it"):
        write_folder(source, "new", overwrite=True)
    assert [path.read_text() for path in source.iterdir()] == ["kept"]


@pytest.mark.parametrize("write", [write_folder, write_file])
def test_what_a_killed_process_left_is_removed(tmp_path, write):
    (tmp_path / ".out.incomplete-1").mkdir()
    (tmp_path / ".out.incomplete-1/a").touch()
    (tmp_path / ".out.incomplete-2").touch()
    write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_are_swapped_if_the_system_cannot_do_it_atomically(tmp_path, monkeypatch):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: object())
    _exchange(tmp_path / "new", tmp_path / "old")
    assert content(tmp_path / "old") == "new" and content(tmp_path / "new") == "old"


def test_json_files(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) is None
    for value in ({"ü": [1, None]}, []):
        write_json(path, value)
        assert read_json(path) == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    path.write_text("{")
    with pytest.raises(UserError, match="a.json is not the JSON file"):
        read_json(path)


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"accuracy": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "found"), [('a: "x\\ud83d"', "half a character"), ('- ["\\0"]', "a NUL character")]
)
def test_yaml_with_half_a_character_or_nul_is_refused(tmp_path, text, found):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=f"a.yaml, line 1: a text with {found}"):
        read_yaml(tmp_path / "a.yaml")


def test_yaml_with_a_key_twice_is_refused_and_merged_keys_are_not(tmp_path):
    """Oracle: by hand; also below the top, and for keys that are no texts."""
    path = tmp_path / "a.yaml"
    for text, line, key in [
        ("a: 1\nb: 2\na: 3", 3, "'a'"),
        ("x:\n  yes: 1\n  on: 2", 3, "True"),
        ("[{a: 1, b: {c: 1, 'c': 2}}]", 1, "'c'"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=f"a.yaml, line {line}: the key {key} is there twice"):
            read_yaml(path)
    path.write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n1: {}\n'1': {}\n")
    assert read_yaml(path) == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, 1: {}, "1": {}}


FULL = """
import resource, sys
from pathlib import Path
from metro.utils.files import new_file, new_folder, write_text
from metro.utils.messages import one_line
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
import torch
from safetensors.torch import save_file
out, big = Path(sys.argv[1]), {{"a": torch.zeros(100_000)}}
try:
    {statement}
except Exception as error:
    print(one_line(error))
"""


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("write_text(out / 'a.txt', 'a' * 100_000)", "a.txt"),
        ("with new_file(out / 'a') as path: path.write_text('a' * 100_000)", "a"),
        ("with new_folder(out / 'a') as path: save_file(big, path / 'b')", "a"),
        ("with new_folder(out / 'a') as path: torch.save(big, path / 'b')", "a"),
        ("with new_folder(out / 'a') as path: torch.save(big, (path / 'b').open('wb'))", "a"),
        ("with new_file(out / 'no' / 'a' / ('n' * 250)) as path: pass", "no/a/"),
    ],
)
def test_a_write_that_fails_names_the_output_and_leaves_the_earlier_one(tmp_path, statement, named):
    """Oracle: a limit on the size of files, which acts as a full disk does, in each library."""
    (tmp_path / "a.txt").write_text("old")
    done = run_python("-c", FULL.format(statement=statement), tmp_path)
    assert done.stdout.startswith(f"{tmp_path / named}"), done.stdout
    assert done.stdout.count("\n") == 1 and re.search("ulimit|too long", done.stdout)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
