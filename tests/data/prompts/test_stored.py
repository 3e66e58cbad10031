"""Prompted examples on disk are read as a sequence, by several processes."""

import json
import pickle

import numpy as np
import pytest

from metro.data.prompts.stored import PromptedExamples, read_manifest
from metro.utils.files import read_json
from metro.utils.messages import UserError
from tests.data.prompts.toys import prepare, random_rows, write_rows


def test_examples_are_a_picklable_sequence_with_source_rows(world, tmp_path):
    rows = random_rows(0, 50)
    rows[10]["text"] = " "  # empty target for "copy"
    write_rows(tmp_path / "data", "one", "train", rows)
    (tmp_path / "mix.yaml").write_text("datasets: [one]\n")
    options = {"templates": world / "templates", "mixture": str(tmp_path / "mix.yaml")}
    result, _ = prepare(tmp_path, tmp_path / "out", **options)
    examples = PromptedExamples(result.folder / "train/one_copy")
    assert examples.rows.tolist() == [i for i in range(50) if i != 10]
    again = pickle.loads(pickle.dumps(examples))
    assert again[10]["row"] == 11 and again[-1] == examples[len(examples) - 1]
    assert [example["row"] for example in again[8:12]] == [8, 9, 11, 12]
    assert sum(1 for _ in again) == 49
    with pytest.raises(IndexError):
        again[49]
    by_hand = tmp_path / "hand.jsonl"
    by_hand.write_text('{"input": "a", "row": 3}\n\n{"input": "b", "row": 5}\n')
    found = PromptedExamples(by_hand)
    assert [found[0]["input"], found[1]["input"]] == ["a", "b"] and found.rows.tolist() == [3, 5]
    with (result.folder / "train/one_copy/train.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="prepare it again"):
        PromptedExamples(result.folder / "train/one_copy")


@pytest.mark.parametrize("what", ["offsets", "rows"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "floats", "matrix"])
def test_damaged_numbers_beside_the_examples_are_named(world, tmp_path, what, damage):
    result, _ = prepare(world, tmp_path / "out", limit=3)
    path = result.folder / f"train/one_ask/train.{what}.npy"
    data = path.read_bytes()
    if damage in ("floats", "matrix"):
        np.save(path, np.zeros(4) if damage == "floats" else np.zeros((2, 2), int))
    else:
        path.write_bytes({"empty": b"", "cut": data[:-3], "text": b"nothing"}[damage])
    with pytest.raises(UserError, match=f"{path} is damaged: prepare the folder again"):
        _ = PromptedExamples(path.parent).rows


def test_every_bit_of_the_numbers_beside_the_examples_may_be_damaged(world, tmp_path):
    """Oracle: the error names the file or one of its rows; nothing else is raised."""
    result, _ = prepare(world, tmp_path / "out", limit=3)
    path = result.folder / "train/one_ask/train.offsets.npy"
    data = path.read_bytes()
    for bit in [*range(0, 128 * 8, 3), *range(128 * 8, len(data) * 8)]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            list(PromptedExamples(path.parent))
        except UserError as error:
            assert "train." in str(error)


@pytest.mark.parametrize("change", [{"subset": []}, {"cap": "x"}, {"num_examples": None}])
def test_damaged_manifests_are_named(world, tmp_path, change):
    result, _ = prepare(world, tmp_path / "out", limit=3)
    path = result.folder / "prompts.json"
    content = read_json(path)
    content["splits"]["train"]["one_ask"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="prompts.json is not the manifest .* damaged"):
        read_manifest(result.folder)


def test_prepared_rows_are_int32_and_offsets_int64(world, tmp_path):
    result, _ = prepare(world, tmp_path / "out", limit=3)
    folder = result.folder / "train/one_ask"
    offsets = np.load(folder / "train.offsets.npy")
    assert offsets.dtype == np.int64 and len(offsets) == 4
    assert np.load(folder / "train.rows.npy").dtype == np.int32
    assert offsets[-1] == (folder / "train.jsonl").stat().st_size
