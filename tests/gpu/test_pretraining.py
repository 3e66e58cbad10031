"""The METRO step on a GPU computes what it computes on the CPU. Oracle: the CPU in fp32.

Run by `scripts/gpu_suite.sh`; skipped where there is no GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.auxiliary import AuxiliaryConfig
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SENTINEL, LENGTH = 200, 64


@pytest.fixture
def model() -> MetroPretrainingModel:
    torch.manual_seed(0)
    sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    config = MetroT5Config(vocab_size=SENTINEL + LENGTH, dropout_rate=0.0, **sizes)
    return MetroPretrainingModel(config, AuxiliaryConfig(1))


def batch(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    original = torch.randint(4, SENTINEL, (4, LENGTH), generator=generator)
    is_masked = torch.rand(original.shape, generator=generator) < 0.15
    tensors = {
        "masked_ids": original.masked_fill(is_masked, SENTINEL),
        "original_ids": original,
        "is_masked": is_masked,
        "decoder_input_ids": F.pad(original[:, :-1], (1, 0), value=SENTINEL),
        "sampling_seed": torch.arange(4),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def step(model: MetroPretrainingModel, device: str):
    """Losses and gradients (on the CPU)."""
    model = model.to(device)
    model.zero_grad()
    losses = model(**batch(device), objective=MetroObjective(weighted_lm=True))
    losses.total.backward()
    gradients = {
        name: parameter.grad.detach().float().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return losses, gradients


def test_losses_and_gradients_equal_those_of_the_cpu(model):
    losses_cpu, gradients_cpu = step(model, "cpu")
    losses_gpu, gradients_gpu = step(model, "cuda")
    # Sampling is a function of seed and position: the same tokens are replaced on both.
    assert int(losses_gpu.num_replaced) == int(losses_cpu.num_replaced)
    for name in ("total", "mlm_loss", "corrective_lm_loss", "rtd_loss"):
        expected, got = getattr(losses_cpu, name), getattr(losses_gpu, name)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert gradients_gpu.keys() == gradients_cpu.keys()
    for name, expected in gradients_cpu.items():
        difference = (gradients_gpu[name] - expected).norm()
        assert difference <= 1e-3 * expected.norm() + 1e-5, name


def test_bf16_autocast_stays_close_to_fp32(model):
    losses_fp32, _ = step(model, "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses_bf16, gradients = step(model, "cuda")
    torch.testing.assert_close(
        losses_bf16.mlm_loss.float(), losses_fp32.mlm_loss.float(), rtol=2e-2, atol=0
    )
    assert all(gradient.isfinite().all() for gradient in gradients.values())
