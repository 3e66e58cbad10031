"""Checksums: no changed bit of a recorded file, a sealed JSON file or an archive goes unnoticed."""

import json
import zipfile

import pytest

from metro.utils.checksums import RECORD, check_archive, damage, record, refuse_damage
from metro.utils.files import read_json, write_json
from metro.utils.messages import UserError


def flips(content: bytes):
    for bit in range(len(content) * 8):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def test_every_flipped_bit_of_a_recorded_file_is_named(tmp_path):
    """Oracle: the content; files that are not recorded are not looked at."""
    (tmp_path / "a.bin").write_bytes(content := bytes(range(20)))
    (tmp_path / "notes").write_text("mine")
    assert list(damage(tmp_path)) == []  # no record
    record(tmp_path, ["a.bin"])
    (tmp_path / "notes").write_text("changed")
    assert list(damage(tmp_path)) == []
    for changed in flips(content):
        (tmp_path / "a.bin").write_bytes(changed)
        assert ["a.bin was damaged" in line for line in damage(tmp_path)] == [True]
    with pytest.raises(UserError, match="a.bin was damaged: .* what was written: copy it again"):
        refuse_damage(tmp_path)
    refuse_damage(tmp_path, most_bytes=19)  # too large to be read: its size is right
    (tmp_path / "a.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match="a.bin has 19 bytes instead of 20"):
        refuse_damage(tmp_path, most_bytes=19)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match="a.bin is missing"):
        refuse_damage(tmp_path)


def test_a_flipped_bit_of_sealed_json_is_an_error_or_changes_nothing(tmp_path):
    """Oracle: what was written; also where keys are numbers, and with letters of any script."""
    path, content = tmp_path / "state.json", {"a": [1, 0.5, None], "ß": {10: "x", 9: True}}
    write_json(path, content, seal=True)
    expected, raw = json.loads(json.dumps(content)), path.read_bytes()
    assert read_json(path) == expected
    named = 0
    for changed in flips(raw):
        path.write_bytes(changed)
        try:
            found = read_json(path)
        except UserError as error:
            named += "state.json" in str(error)
            continue
        assert {name: found[name] for name in expected} == expected
    assert named > 400
    write_json(path, expected)  # by other programs: without a checksum
    assert read_json(path) == expected


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "a").write_text("a")
    record(tmp_path, ["a"])
    path = tmp_path / RECORD
    path.write_text(path.read_text().replace('"bytes": 1', '"bytes": 2'))
    with pytest.raises(UserError, match="checksums.json was damaged or changed"):
        refuse_damage(tmp_path)
    for content in ("[]", '{"files": 3}', '{"files": {"a": 3}}'):
        path.write_text(content)
        with pytest.raises(UserError, match="checksums.json is damaged"):
            refuse_damage(tmp_path)


def test_a_flipped_bit_of_what_torch_saved_is_found(tmp_path):
    """Oracle: the tensor; an archive that was written without checksums is not refused."""
    import torch

    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(50.0)}, path)
    check_archive(path)
    content = path.read_bytes()
    place = content.index(torch.arange(50.0).numpy().tobytes())
    for index in range(place, place + 200):
        changed = bytearray(content)
        changed[index] ^= 8
        path.write_bytes(changed)
        with pytest.raises(zipfile.BadZipFile, match="checksum of its entry a/data/0"):
            check_archive(path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(50.0)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    check_archive(path)
