"""fairseq-train on one GPU, as a user runs it: in full and half precision, resumed, under torchrun.

Oracle: the losses that the same run logs in fp32. Sums on a GPU come in any order, so runs are
compared to a tolerance. Run by `scripts/gpu_suite.sh`; skipped where there is no GPU or no fairseq.
"""

from pathlib import Path

import pytest
import torch

from tests.plugins.conftest import METRO, NO_DROPOUT, T5, TINY, load, run, write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.fairseq,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_GPU = [options.replace(" --cpu", "") for options in TINY]
LAST = "checkpoint_last.pt"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_documents=60)
    return folder


def losses(result) -> list[float]:
    return [float(line["loss"]) for line in result.logged("train_inner")]


@pytest.fixture(scope="module")
def fp32_losses(corpus, tmp_path_factory) -> list[float]:
    """Of four updates of METRO in fp32, without dropout."""
    options = [*ON_GPU, *METRO, NO_DROPOUT, f"--save-dir {tmp_path_factory.mktemp('fp32')}"]
    return losses(run("fairseq-train", str(corpus), *options, "--max-update 4"))


@pytest.mark.parametrize("precision", ["--fp16 --fp16-init-scale 4", "--bf16"])
def test_half_precision_trains_like_fp32_and_resumes(corpus, tmp_path, fp32_losses, precision):
    options = [str(corpus), *ON_GPU, *METRO, NO_DROPOUT, precision, f"--save-dir {tmp_path}"]
    first = run("fairseq-train", *options, "--max-update 2")
    resumed = run("fairseq-train", *options, "--max-update 4")
    assert "@ 2 updates)" in resumed.text
    # The auxiliary model draws some other samples where its logits are rounded.
    assert losses(first) + losses(resumed) == pytest.approx(fp32_losses, rel=0.1)
    assert all(weight.isfinite().all() for weight in load(tmp_path / LAST)["model"].values())


def test_span_corruption_trains_in_bf16(corpus, tmp_path):
    options = [str(corpus), *ON_GPU, *T5, f"--bf16 --save-dir {tmp_path} --max-update 2"]
    assert len(losses(run("fairseq-train", *options))) == 2


def test_nccl_under_torchrun_trains_the_model_of_one_process(
    corpus, tmp_path, fp32_losses, monkeypatch
):
    """One process joins no others by itself; told to, it goes through NCCL's initialisation."""
    monkeypatch.setenv("NCCL_DEBUG", "VERSION")
    options = [str(corpus), *ON_GPU, *METRO, NO_DROPOUT, f"--save-dir {tmp_path}"]
    join = "--distributed-init-method env:// --distributed-no-spawn --distributed-world-size 1"
    first = run("fairseq-train", *options, join, "--max-update 2", processes=1)
    resumed = run("fairseq-train", *options, "--max-update 4", processes=1)
    if torch.cuda.is_available():
        assert "NCCL version" in first.text
    assert "@ 2 updates)" in resumed.text
    assert losses(first) + losses(resumed) == pytest.approx(fp32_losses, rel=1e-3)
