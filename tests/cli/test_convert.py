"""`metro convert`, as it is typed."""

import torch
from click.testing import CliRunner

from metro.cli.convert import command
from metro.utils.messages import UserError


def metro_convert(*arguments, code: int = 0):
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if code == 0:
        assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_there_and_back(golden, tmp_path):
    """Oracle: the checkpoint that it started with."""
    checkpoint = golden / "checkpoints/metro_tiny_r.pt"
    vocab = golden / "tiny_vocab"
    folder, back = tmp_path / "model", tmp_path / "back.pt"
    done = metro_convert("to-hf", checkpoint, "--out", folder, "--vocab", vocab, "--keep-auxiliary")
    assert "371,456 parameters in float32" in done.output
    assert "lowercases" in done.output and "auxiliary" not in done.output.split("note:")[0]
    done = metro_convert("to-fairseq", folder, "--out", back)
    assert "auxiliary model" in done.output and "original parameter names" in done.output
    assert f"vocabulary: stays in {folder}" in " ".join(done.output.split("\n"))
    (folder / "sp.model").unlink()
    done = metro_convert("to-fairseq", folder, "--out", tmp_path / "again.pt")
    assert f"vocabulary: {folder} has none" in done.output
    original = torch.load(checkpoint, weights_only=True)["model"]
    state = torch.load(back, weights_only=True)["model"]
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())


def test_what_is_left_out_is_said(golden, tmp_path):
    checkpoint = golden / "checkpoints/metro_tiny_a.pt"
    vocab = golden / "tiny_vocab"
    done = metro_convert(
        "to-hf", checkpoint, "--out", tmp_path / "out", "--vocab", vocab, "--dtype", "bf16"
    )
    assert "left out: the auxiliary model and the RTD head" in done.output
    assert "--keep-auxiliary keeps it" in done.output
    assert "parameters in bfloat16" in done.output


def test_mistakes_are_errors_of_the_user(golden, tmp_path):
    """Oracle: the class that the command line shows as one line."""
    checkpoint = golden / "checkpoints/metro_tiny_a.pt"
    (tmp_path / "taken").mkdir()
    for arguments, word in (
        (("to-hf", checkpoint, "--out", tmp_path / "x", "--dtype", "int4"), "int4"),
        (("to-hf", checkpoint, "--out", tmp_path / "x"), "--vocab"),
        (("to-fairseq", tmp_path / "taken", "--out", tmp_path / "x.pt"), "config.json"),
    ):
        done = metro_convert(*arguments, code=1)
        assert isinstance(done.exception, UserError) and word in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
