"""The output folder of a run: resumed, finished, changed, damaged, or of something else."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import metro
from metro.finetuning.run import finetune
from metro.training.output_folder import complete_checkpoints
from metro.utils.locks import locked
from metro.utils.messages import UserError
from tests.finetuning.conftest import assert_same, weights


def test_a_folder_that_another_run_trains_in_is_refused(settings):
    """Oracle: nothing is written there meanwhile, and the same call works afterwards."""
    chosen = settings(max_steps=1)
    folder = Path(chosen.output_dir)
    with locked(folder, inside=True), pytest.raises(UserError, match="is being written by"):
        finetune(chosen)
    assert list(folder.iterdir()) == []
    assert finetune(chosen).num_updates == 1
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("objective", ["direct", "flipped"])
def test_a_resumed_run_is_bit_exact(settings, objective):
    """With dropout and across the end of an epoch (15 updates), stopped in the middle of one."""
    common = dict(objective=objective, save_steps=7, dropout=0.1, save_total_limit=None)
    whole = finetune(settings("whole", **common, max_steps=22))
    finetune(settings("halves", **common, max_steps=7))
    resumed = finetune(settings("halves", **common, max_steps=22))
    assert_same(whole.folder, resumed.folder)
    assert whole.metrics["likelihood" if objective == "flipped" else "token_nll"] == pytest.approx(
        resumed.metrics["likelihood" if objective == "flipped" else "token_nll"], abs=1e-6
    )


def test_a_run_that_was_cut_off_while_saving_goes_on_from_the_checkpoint_before(settings):
    chosen = settings(save_steps=4, save_total_limit=None)
    first = finetune(chosen)
    expected = weights(first.folder)
    out = Path(chosen.output_dir)
    (out / "checkpoint-12" / "trainer_state.json").unlink()  # written last
    (out / "config.json").unlink()
    (out / "trainer_state.json").unlink()
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-4", "checkpoint-8"]
    again = finetune(chosen)
    assert again.num_updates == 12
    for name, tensor in weights(again.folder).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("num_moved", [0, 1, 4])
def test_a_run_cut_off_while_its_model_is_moved_ends_as_if_left_alone(
    settings, capsys, monkeypatch, num_moved
):
    """Oracle: the run left alone. Without checkpoints, yet nothing is trained again."""
    whole = finetune(settings("whole", save_steps=0, max_steps=3))
    finetune(settings(save_steps=0, max_steps=2))
    replace, moves = os.replace, iter(range(num_moved))

    def replace_some(source, target):
        is_move = Path(source).parent.name == ".model.partial" and Path(target).parent.name == "out"
        if is_move and next(moves, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings(save_steps=0, max_steps=3))
    monkeypatch.undo()
    capsys.readouterr()
    again = finetune(settings(save_steps=0, max_steps=3))
    assert "nothing to do" in capsys.readouterr().err and again.num_updates == 3
    assert_same(again.folder, whole.folder)
    assert not (again.folder / ".model.partial").exists()


def test_a_run_killed_before_its_model_was_written_trains_no_more(settings):
    """Oracle: the model that is deleted."""
    whole = finetune(settings("whole", save_steps=2, max_steps=4))
    out = finetune(settings(save_steps=2, max_steps=4)).folder
    for path in out.glob("*.*"):
        if path.is_file() and path.name not in ("finetune.yaml", "inputs.json"):
            path.unlink()
    assert finetune(settings(save_steps=2, max_steps=4)).num_updates == 4
    assert_same(out, whole.folder)


def test_a_changed_byte_of_a_run_is_named(settings):
    """Oracle: by hand: a digit or byte in the middle becomes another, in one file after another."""
    out = finetune(settings(save_steps=2, max_steps=2)).folder
    states = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for name, steps in (
        *((f"checkpoint-2/{state}", 4) for state in (*states, "model.safetensors")),
        *(("inputs.json", 4), ("trainer_state.json", 2), ("model.safetensors", 2)),
    ):
        content = bytearray((out / name).read_bytes())
        digits = [i for i, byte in enumerate(content) if byte in b"12345678"]
        is_text = name.endswith(".json")
        content[digits[len(digits) // 2] if is_text else len(content) // 2] ^= 1
        before = (out / name).read_bytes()
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{Path(name).name} was damaged"):
            finetune(settings(save_steps=2, max_steps=steps))
        if name == "model.safetensors":
            with pytest.raises(UserError, match="was damaged.*delete .*checksums"):
                metro.load(out)
        (out / name).write_bytes(before)
    assert finetune(settings(save_steps=2, max_steps=4)).num_updates == 4


def test_a_finished_run_started_again_trains_nothing_and_goes_on_where_more_is_asked_for(
    settings, capsys
):
    """Oracle: the file's time and content."""
    first = finetune(settings(save_steps=6))
    before = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = finetune(settings(save_steps=6))
    assert "nothing to do" in capsys.readouterr().err
    assert again.num_updates == 12 and again.metrics == first.metrics
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == before
    more = finetune(settings(save_steps=6, max_steps=14))
    assert more.num_updates == 14
    whole = finetune(settings("whole", max_steps=14))
    assert_same(more.folder, whole.folder)


def test_other_settings_do_not_continue_a_run(settings):
    finetune(settings(save_steps=6))
    with pytest.raises(ValueError, match="learning_rate was 0.01 and is 0.5"):
        finetune(settings(save_steps=6, learning_rate=0.5))
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(settings(resume="never"))
    with pytest.raises(ValueError, match="not a complete checkpoint-N folder"):
        finetune(settings(resume="nowhere"))


@pytest.mark.parametrize("content", ["a: [", "", "- 1", "text"])
def test_damaged_settings_of_the_earlier_run_are_named(settings, tmp_path, content):
    checkpoint = tmp_path / "out/checkpoint-6"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / "out/finetune.yaml").write_text(content)
    with pytest.raises(UserError, match="finetune.yaml"):
        finetune(settings())


def test_a_folder_of_something_else_is_left_alone(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not of metro finetune"):
        finetune(settings())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def change_model(source, place, change):
    model, tokenizer = metro.load(source)
    with torch.no_grad():
        change(model)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_a_run_does_not_go_on_with_another_model_or_other_data(settings, folder, tmp_path):
    """Oracle: by hand: one number of a weight, one example; unfinished and finished runs alike."""
    places = [shutil.copytree(place, tmp_path / f"in{number}") for number, place in
              enumerate((settings().model, folder))]  # fmt: skip
    chosen = dict(model=str(places[0]), data=str(places[1]), save_steps=1, max_steps=1)
    finetune(settings(**chosen))

    def nudge(model):
        model.shared.weight[20, 3] += 0.5

    for max_steps in (1, 2):
        now = {**chosen, "max_steps": max_steps}
        change_model(settings().model, places[0], nudge)
        with pytest.raises(UserError, match="run on other weights of .*in0: changed or replaced"):
            finetune(settings(**now))
        shutil.copytree(settings().model, places[0], dirs_exist_ok=True)
        with next(places[1].glob("train/*/train.jsonl")).open("a") as file:
            file.write("\n")
        with pytest.raises(UserError, match="run on other data of .*in1: changed or replaced"):
            finetune(settings(**now))
        shutil.copytree(folder, places[1], dirs_exist_ok=True)
    assert finetune(settings(**chosen)).num_updates == 1
    moved = places[0].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model was .*in0"):
        finetune(settings(**{**chosen, "model": str(moved)}))
