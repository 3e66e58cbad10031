"""What comes back from a Hugging Face folder is trained further by fairseq."""

import pytest
import torch

from metro.conversion.hf_to_fairseq import to_fairseq
from tests.plugins import conftest as plugins
from tests.plugins.conftest import METRO, NO_DROPOUT, T5, assert_equal_runs, load

pytestmark = pytest.mark.fairseq
corpus, run_here, train = plugins.corpus, plugins.run_here, plugins.train  # fixtures

SIZES = [
    "--encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-layers 2 --max-update 2",
    "--encoder-attention-heads 4 --max-positions 1024 --tokens-per-sample 128",
    "--max-tokens 1024 --disable-validation",
    NO_DROPOUT,
]


@pytest.mark.parametrize("names", ["original", "metro"])
def test_training_from_a_round_trip_equals_training_from_the_original(
    exported, golden, recorded_text, tmp_path, train, names
):
    """Oracle: two updates from the original's own checkpoint, weights and Adam state."""
    to_fairseq(exported("metro_tiny_a"), tmp_path / "back.pt", names=names)
    sources = {"original": golden / "checkpoints/metro_tiny_a.pt", "back": tmp_path / "back.pt"}
    runs = []
    for name, source in sources.items():
        options = [*SIZES, "--weighted-lm-loss", f"--finetune-from-model {source}"]
        train(tmp_path / name, *options, kind=METRO, data=recorded_text)
        runs.append(load(tmp_path / name / "checkpoint_last.pt"))
    assert_equal_runs(*runs)


def test_a_released_folder_is_restored_and_trained(golden, recorded_text, tmp_path, train):
    """Oracle: the released weights, one step of Adam away (at most the learning rate)."""
    to_fairseq(golden / "hf_export/t5_tiny_c", tmp_path / "c.pt", dtype=torch.float32)
    options = [*SIZES, f"--restore-file {tmp_path / 'c.pt'} --weight-decay 0"]
    log = train(tmp_path / "run", *options, kind=T5, data=recorded_text)
    losses = [float(line["loss"]) for line in log.logged("train_inner")]
    assert len(losses) == 2 and all(4 < loss < 8 for loss in losses)  # bits; random is 10
    released = torch.load(golden / "hf_export/t5_tiny_c/pytorch_model.bin", weights_only=True)
    trained = load(tmp_path / "run/checkpoint_last.pt")["model"]
    change = [
        (trained[f"model.{name}"] - tensor.float()).abs().max().item()
        for name, tensor in released.items()
    ]
    assert 0 < max(change) < 2 * 0.003 + 1e-4


def test_fairseq_loads_it_by_itself(exported, golden, tmp_path):
    """Oracle: the tensors; settings of plain values are enough to build task and model."""
    from fairseq import checkpoint_utils

    import fairseq_plugins  # noqa: F401

    for name in ("metro_tiny_r", "t5_tiny_c"):
        path = tmp_path / f"{name}.pt"
        to_fairseq(exported(name), path)
        data = {"data": str(golden / "prompt_T0-bin")}
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], data)
        state = models[0].model.state_dict()
        prefix = "main." if name.startswith("metro") else ""
        original = load(golden / f"checkpoints/{name}.pt")["model"]
        key = f"{prefix}decoder.block.1.layer.2.DenseReluDense.wo.weight"
        assert torch.equal(state[key], original["decoder.layers.1.fc2.weight"])


def test_pretraining_then_prompt_finetuning_then_a_folder(golden, tmp_path):
    """Oracle: the weights that fairseq saved; a finetuned model starts and ends with </s>."""
    import fairseq_cli.train

    import metro
    from metro.conversion.fairseq_to_hf import to_hf

    options = [
        f"--user-dir {plugins.ROOT / 'fairseq_plugins'} --task t5_prompt_finetuning --cpu",
        "--arch transformer_t5_base_rpe --criterion label_smoothed_cross_entropy",
        "--optimizer adam --lr 0.001 --lr-scheduler polynomial_decay --total-num-update 10",
        "--truncate-source --truncate-target --required-batch-size-multiple 1 --num-workers 0",
        f"--no-epoch-checkpoints --save-dir {tmp_path / 'run'}",
        f"--finetune-from-model {golden / 'checkpoints/metro_tiny_a.pt'}",
    ]
    data = golden / "prompt_T0-bin"
    fairseq_cli.train.main(plugins.configure(data, *SIZES, *options))
    checkpoint = tmp_path / "run/checkpoint_last.pt"
    done = to_hf(checkpoint, tmp_path / "model", vocab=golden / "tiny_vocab")
    assert done.dropped == ["the optimizer state"]
    model, _ = metro.load(tmp_path / "model")
    state = load(checkpoint)["model"]
    assert all(torch.equal(state[f"model.{n}"], t) for n, t in model.state_dict().items())
    assert model.generation_config.decoder_start_token_id == 2
    assert model.generation_config.eos_token_id == 2
    card = (tmp_path / "model/README.md").read_text()
    assert "prompt finetuning" in card and "| updates | 300 + 2 |" in card
