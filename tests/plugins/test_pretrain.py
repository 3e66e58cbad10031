"""`metro pretrain` and fairseq with the plugins: two entrances to one training."""

import numpy as np
import pytest
import torch

from metro.conversion.hf_to_fairseq import to_fairseq
from metro.models.fairseq_checkpoint import read_checkpoint
from metro.training.output_folder import TRAINER_STATE
from metro.utils.files import read_json
from tests.plugins.conftest import METRO, NO_DROPOUT, T5

pytest.importorskip("accelerate")


def logged(folder) -> list[dict]:
    history = read_json(folder / TRAINER_STATE)["log_history"]
    return [line for line in history if "grad_norm" in line]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", [METRO, T5], ids=["metro", "t5"])
def test_both_entrances_train_the_same_model(
    train,
    pretrain,
    pretraining_data,
    tmp_path,
    kind,
    dropout,
):
    """From the same seed: batches, masks, samples, rates, losses, gradients, weights.

    Twelve updates of two micro-batches cross the end of an epoch.
    """
    options = [] if dropout else [NO_DROPOUT]
    theirs = train(
        tmp_path / "fairseq",
        "--update-freq 2 --max-update 12",
        *options,
        kind=kind,
        data=pretraining_data,
    )
    task = {"task": "t5"} if kind is T5 else {"keep_auxiliary": True}
    ours = pretrain(
        update_freq=2, max_update=12, dropout=dropout, attention_dropout=dropout, **task
    )
    lines, expected = logged(ours.folder), theirs.logged("train_inner")
    assert len(lines) == len(expected) == 12
    for line, want in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(float(want["loss"]), abs=2e-3)
        assert line["grad_norm"] == pytest.approx(float(want["gnorm"]), rel=2e-3, abs=2e-3)
        assert int(line["epoch"] + 1 - 1e-9) == want["epoch"]
    for name in ("generator_accuracy", "replaced_accuracy", "replace_ratio", "accuracy"):
        if name in expected[0]:
            found = [line[name] for line in lines]
            assert found == pytest.approx([float(want[name]) for want in expected], abs=2e-3)
    checkpoint = read_checkpoint(tmp_path / "fairseq/checkpoint_last.pt")
    to_fairseq(ours.folder, tmp_path / "ours.pt")
    own = read_checkpoint(tmp_path / "ours.pt")
    for state, other in ((own.main, checkpoint.main), (own.extra, checkpoint.extra)):
        assert state.keys() == other.keys()
        for name, weight in state.items():
            torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [METRO, T5], ids=["metro", "t5"])
def test_each_goes_on_from_what_the_other_has_trained(
    train,
    pretrain,
    pretraining_data,
    tmp_path,
    kind,
):
    """Oracle: the same weights give the same loss on the same first batch."""
    task = {"task": "t5"} if kind is T5 else {"keep_auxiliary": True}
    options = dict(data=pretraining_data, kind=kind)
    train(tmp_path / "theirs", "--max-update 3", **options)
    ours = pretrain("ours", max_update=3, **task).folder
    to_fairseq(ours, tmp_path / "ours.pt")
    for source, folder in (
        (tmp_path / "theirs/checkpoint_last.pt", "from_theirs"),
        (tmp_path / "ours.pt", "from_ours"),
    ):
        start = f"--max-update 1 --finetune-from-model {source}"
        [want] = train(tmp_path / f"fairseq_{folder}", start, **options).logged("train_inner")
        done = pretrain(f"metro_{folder}", max_update=1, finetune_from_model=str(source), **task)
        [line] = logged(done.folder)
        assert line["loss"] == pytest.approx(float(want["loss"]), abs=2e-3)
        assert np.isfinite(line["grad_norm"])
