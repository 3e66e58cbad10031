"""The METRO step on a GPU computes what it computes on the CPU. Oracle: the CPU in fp32.

Run by `scripts/gpu_suite.sh`; skipped where there is no GPU.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from metro.fusion import fuse
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.ops.adamw import adamw_step
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SENTINEL, LENGTH = 200, 64
DEVICE = "cuda"


def build(dropout: float) -> MetroPretrainingModel:
    torch.manual_seed(0)
    sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    rates = dict(dropout_rate=dropout, attention_dropout_rate=dropout)
    config = MetroT5Config(vocab_size=SENTINEL + LENGTH, **sizes, **rates)
    return MetroPretrainingModel(config, MetroPretrainingConfig(1))


@pytest.fixture
def model() -> MetroPretrainingModel:
    return build(dropout=0.0)


def batch(device: str, has_padding: bool = False) -> dict:
    """Four rows, the second one half as long where there is padding; all that a step is told."""
    generator = torch.Generator().manual_seed(1)
    original = torch.randint(4, SENTINEL, (4, LENGTH), generator=generator)
    is_masked = torch.rand(original.shape, generator=generator) < 0.15
    if has_padding:
        original[1, LENGTH // 2 :] = MetroT5Config().pad_token_id
        is_masked[1, LENGTH // 2 :] = False
    tensors = {
        "masked_ids": original.masked_fill(is_masked, SENTINEL),
        "original_ids": original,
        "is_masked": is_masked,
        "decoder_input_ids": F.pad(original[:, :-1], (1, 0), value=SENTINEL),
        "sampling_seed": torch.arange(4),
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**tensors, "max_masked": int(is_masked.sum(1).max()), "has_padding": has_padding}


def step(model: MetroPretrainingModel, device: str, has_padding: bool = False, **given):
    """Losses and gradients (on the CPU)."""
    model = model.to(device)
    model.zero_grad()
    inputs = {**batch(device, has_padding), **given}
    losses = model(**inputs, objective=MetroObjective(weighted_lm=True))
    losses.total.backward()
    gradients = {
        name: parameter.grad.detach().float().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return losses, gradients


def given_samples(has_padding: bool = False) -> torch.Tensor:
    """Corrupted ids: in half precision the auxiliary model would draw other ones."""
    inputs = batch("cpu", has_padding)
    samples = torch.randint(4, SENTINEL, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    return samples.where(inputs["is_masked"], inputs["masked_ids"])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("has_padding", [False, True], ids=["full", "padded"])
def test_losses_and_gradients_equal_those_of_the_cpu(model, has_padding, fused):
    losses_cpu, gradients_cpu = step(model, "cpu", has_padding)
    if fused:
        fuse(model)
    losses_gpu, gradients_gpu = step(model, DEVICE, has_padding)
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
    losses_fp32, _ = step(model, DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        losses_bf16, gradients = step(model, DEVICE)
    torch.testing.assert_close(
        losses_bf16.mlm_loss.float(), losses_fp32.mlm_loss.float(), rtol=2e-2, atol=0
    )
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("has_padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=["bf16", "fp16"]
)
def test_fused_model_in_half_precision_stays_close_to_fp32(model, dtype, tolerance, has_padding):
    """As fairseq trains with --bf16 and --fp16: the weights themselves are cast."""
    corrupted = given_samples(has_padding).to(DEVICE)
    losses_fp32, gradients_fp32 = step(model, DEVICE, has_padding, corrupted_ids=corrupted)
    losses, gradients = step(fuse(model.to(dtype)), DEVICE, has_padding, corrupted_ids=corrupted)
    for name in ("total", "mlm_loss", "corrective_lm_loss", "rtd_loss"):
        expected, got = getattr(losses_fp32, name), getattr(losses, name)
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=0)
    assert gradients.keys() == gradients_fp32.keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    flat, flat_fp32 = (
        torch.cat([values[name].flatten() for name in gradients_fp32])
        for values in (gradients, gradients_fp32)
    )
    assert (flat - flat_fp32).norm() <= 4 * tolerance * flat_fp32.norm()


@pytest.mark.parametrize("has_padding", [False, True], ids=["full", "padded"])
def test_a_step_never_waits_for_the_gpu(has_padding):
    """Told the most masked positions and whether there is padding, nothing has to be looked at.

    Forward, backward and the optimiser's step. What waits in an update of fairseq-train, whatever
    the number of batches in it, is outside: fairseq's division by the number of positions, its
    check of the gradient norm (of the loss scale in fp16), our check of the losses right after, and
    what is logged, fetched together (next test).
    """
    model = fuse(build(dropout=0.1).to(DEVICE, torch.bfloat16))
    inputs = batch(DEVICE, has_padding)
    params = list(model.parameters())
    masters, *moments = ([p.detach().float() * factor for p in params] for factor in (1, 0, 0))

    settings = dict(lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)

    def update(step: int) -> None:
        model(**inputs, objective=MetroObjective(weighted_lm=True)).total.backward()
        gradients = [p.grad.float() for p in params]
        adamw_step(masters, gradients, *moments, step, **settings)
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        for param in params:
            param.grad = None

    update(1)  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_captured_as_a_cuda_graph(model):
    """Oracle: the same step run eagerly. A graph runs without the host."""
    model = fuse(model.to(DEVICE, torch.bfloat16))
    inputs = {**batch(DEVICE), "corrupted_ids": given_samples().to(DEVICE)}

    def loss_and_gradients():
        loss = model(**inputs, objective=MetroObjective(weighted_lm=True)).total
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [loss, *(gradient for gradient in gradients if gradient is not None)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up once, outside of the graph
        want = [x.detach().clone() for x in loss_and_gradients()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, want, strict=True):
        assert (a - b).float().norm() <= 1e-2 * b.float().norm() + 1e-6


@pytest.mark.fairseq
def test_what_is_logged_is_fetched_with_one_wait():
    """Oracle: the warnings of PyTorch, one for each wait."""
    from fairseq_plugins.criterions.t5_metro import on_host

    sums = {"loss": torch.tensor(1.5, device=DEVICE), "missing": 0}
    sums |= {f"count {i}": torch.tensor(2**40 + i, device=DEVICE) for i in range(9)}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fetched = on_host(sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1
    for name, value in sums.items():
        assert fetched[name] == value
        assert name == "missing" or (fetched[name].dtype, fetched[name].is_cuda) == (
            value.dtype,
            False,
        )


def test_gradients_averaged_over_nccl_are_those_of_one_process(model):
    _, expected = step(model, DEVICE)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        _, got = step(torch.nn.parallel.DistributedDataParallel(model), DEVICE)
    finally:
        dist.destroy_process_group()
    assert got.keys() == {f"module.{name}" for name in expected}
    for name, gradient in expected.items():
        torch.testing.assert_close(got[f"module.{name}"], gradient, rtol=1e-3, atol=1e-5)


def test_dropout_is_reproducible_from_the_seed_of_pytorch():
    """A resumed run restores PyTorch's generators and no other."""
    model, totals = fuse(build(dropout=0.1)), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        totals.append(step(model, DEVICE)[0].total.item())
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert totals[0] != pytest.approx(totals[2], rel=1e-5)
