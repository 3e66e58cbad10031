"""The operations that `ops.py` measures: inputs, ways to compute them, and what they cost at least.

Floors: `relative_position_attention` multiplies 14 B H T S K (forward 4, backward 10 with the
scores computed again, half where causal), a tenth of what a layer's matrices cost at 512 tokens,
and moves 12 times B H T K; `feed_forward` multiplies 12 N D F, `packed_linear` 6 N D O,
`linear_cross_entropy` and `linear_sample_cross_entropy` 6 N V D, and 2 N V D more where logits are
computed again; `dropout` moves 4 numbers for each element, `dropout_add_layer_norm` 8, `adamw` 7
for each parameter.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from metro.ops.adamw import adamw_step
from metro.ops.dropout import dropout
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm
from metro.ops.feed_forward import feed_forward
from metro.ops.kernels.trials import TRAINED
from metro.ops.linear import packed_linear
from metro.ops.linear_cross_entropy import linear_cross_entropy
from metro.ops.linear_sample_cross_entropy import linear_sample_cross_entropy
from metro.ops.relative_position_attention import relative_position_attention

BATCH, HEADS, LENGTH, WIDTH = 4, 12, 512, 64
D, INNER, VOCAB_SIZE = HEADS * WIDTH, 3072, 32768
ROWS = {"cpu": BATCH * LENGTH, "cuda": 32 * LENGTH}
"""Tokens that the operations of whole layers get."""

Way = Callable[[], "torch.Tensor | list[torch.Tensor]"]


class Case(NamedTuple):
    """One operation on given inputs."""

    leaves: list[torch.Tensor]
    ways: dict[str, Way]
    """Those of METRO and the plain one, which is the first, with which the others are compared."""
    is_random: bool = False
    """Outputs differ, and are not compared."""
    flops: float = 0.0
    """Multiplications and additions that no way can do without, forward and backward."""
    moved: float = 0.0
    """Bytes likewise."""
    can_replay: bool = False
    """All ways are known not to wait for the GPU in between: a CUDA graph can hold them."""
    rivals: dict[str, Callable[[], Way]] = {}
    """Name, and what makes a way of another package or compiler."""


def attention_case(device: str, *flags: str) -> Case:
    """Of one layer; on a GPU of a batch of 32, and, without dropout, FlexAttention beside it.

    ``flags``: bias, causal, mask, dropout, and positions: for queries at 15 % of the positions, as
    in the last layer of METRO's auxiliary model and of its decoder, where FlexAttention is not
    measured.
    """
    p, is_causal = 0.1 * ("dropout" in flags), "causal" in flags
    batch = ROWS[device] // LENGTH
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(batch, LENGTH, HEADS, WIDTH, device=device).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    bias = torch.randn(HEADS, 2 * LENGTH - 1, device=device) if "bias" in flags else None
    key_mask = None
    if "mask" in flags:  # to half the length at most
        lengths = torch.linspace(LENGTH // 2, LENGTH, batch, device=device)
        key_mask = torch.arange(LENGTH, device=device) < lengths.unsqueeze(1)
    positions = None
    if "positions" in flags:
        chosen = torch.rand(batch, LENGTH, device=device).topk(round(0.15 * LENGTH)).indices
        positions = chosen.sort(1).values
        q = q[:, :, : positions.shape[1]].contiguous()
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]

    def run(impl):
        return relative_position_attention(q, k, v, bias, key_mask, is_causal, positions, p, impl)

    kernel = "triton" if device == "cuda" else "cached"
    ways = {impl: partial(run, impl) for impl in ("reference", kernel)}
    rivals = compiled_on_gpu(ways["reference"], device)
    if device == "cuda" and not p and positions is None:
        rivals["FlexAttention"] = partial(flex_attention_way, q, k, v, bias, key_mask, is_causal)
    num_pairs = q.shape[:3].numel() * LENGTH / (2 if is_causal else 1)
    moved = 6 * (q.nbytes + k.nbytes)
    flops = 14 * num_pairs * WIDTH
    return Case(leaves, ways, bool(p), flops, moved, can_replay=True, rivals=rivals)


def flex_attention_way(q, k, v, bias, key_mask, is_causal) -> Callable[[], torch.Tensor]:
    """Bias and visibility as functions of a pair; it has no dropout, and on the CPU no gradients.

    Its blocks of visible pairs are found once, which a training step has to do for every batch.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def add_bias(score, row, head, query, key):
        return score if bias is None else score + bias[head, key - query + LENGTH - 1]

    def is_visible(row, head, query, key):
        visible = key <= query if is_causal else key >= 0
        return visible if key_mask is None else visible & key_mask[row, key]

    blocks = None
    if is_causal or key_mask is not None:
        blocks = create_block_mask(is_visible, len(q), None, LENGTH, LENGTH, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, score_mod=add_bias, block_mask=blocks)


def dropout_case(device: str) -> Case:
    x = torch.randn(BATCH, LENGTH, D).requires_grad_()
    ways = {impl: partial(dropout, x, 0.1, impl=impl) for impl in ("reference", "bits")}
    return Case([x], ways, is_random=True, moved=4 * x.nbytes)


def draw_leaves(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Small numbers in the type of the device."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [
        (torch.randn(shape, device=device) * 0.05).to(dtype).requires_grad_() for shape in shapes
    ]


def compiled_on_gpu(plain: Way, device: str) -> dict[str, Callable[[], Way]]:
    """torch.compile of PyTorch's way, on a GPU."""
    return {"torch.compile": partial(torch.compile, plain)} if device == "cuda" else {}


def feed_forward_case(device: str) -> Case:
    num_rows = ROWS[device]
    leaves = draw_leaves(device, (num_rows, D), (INNER, D), (INNER,), (D, INNER), (D,))
    impls = ("reference", "epilogue" if device == "cuda" else "in_place")
    ways = {impl: partial(feed_forward, *leaves, impl=impl) for impl in impls}
    rivals = compiled_on_gpu(ways["reference"], device)
    flops = 12 * num_rows * D * INNER
    return Case(leaves, ways, flops=flops, can_replay=True, rivals=rivals)


def packed_linear_case(device: str) -> Case:
    """Queries, keys and values."""
    num_rows = ROWS[device]
    leaves = draw_leaves(device, (num_rows, D), *[(D, D)] * 3, *[(D,)] * 3)
    x, weights, biases = leaves[0], leaves[1:4], leaves[4:]
    impls = ("reference", "summed", "packed")
    ways = {impl: partial(packed_linear, x, weights, biases, impl) for impl in impls}
    rivals = compiled_on_gpu(ways["reference"], device)
    flops = 6 * num_rows * D * 3 * D
    return Case(leaves, ways, False, flops, 9 * x.nbytes, can_replay=True, rivals=rivals)


def dropout_add_layer_norm_case(device: str, *flags: str) -> Case:
    """``mixed``: with a residual and weights in float32, as under autocast."""
    num_rows, p = ROWS[device], 0.1 * ("dropout" in flags)
    leaves = draw_leaves(device, (num_rows, D), (num_rows, D), (D,), (D,))
    if "mixed" in flags:
        leaves = [leaves[0], *(x.detach().float().requires_grad_() for x in leaves[1:])]

    def plain():
        x, residual, weight, bias = leaves
        return F.layer_norm(residual + F.dropout(x, p), (D,), weight, bias)

    impl = "triton" if device == "cuda" else "reference"
    ways = {"plain": plain, impl: partial(dropout_add_layer_norm, *leaves, p, impl=impl)}
    rivals, moved = compiled_on_gpu(plain, device), (8 if p else 7) * leaves[0].nbytes
    return Case(leaves, ways, bool(p), moved=moved, can_replay=True, rivals=rivals)


def adamw_case(device: str) -> Case:
    """Matrices of twelve layers (on the CPU three) in float32, each way with its own."""
    layers = 12 if device == "cuda" else 3
    shapes = ([(D, D), (D,)] * 4 + [(INNER, D), (INNER,)] * 2) * layers
    settings = dict(lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)

    def way(impl):
        tensors = [[torch.randn(s, device=device) for s in shapes] for _ in range(4)]
        tensors[3] = [x.square() for x in tensors[3]]
        return partial(adamw_step, *tensors, 100, impl=impl, **settings)

    size = sum(math.prod(shape) for shape in shapes)
    ways = {impl: way(impl) for impl in ("reference", "fused")}
    return Case([], ways, True, moved=28 * size, can_replay=True)


def projection_case(device: str, *flags: str, samples: bool) -> Case:
    """Tied projection of 1,024 tokens, on a GPU 8,192; multinomial waits for it."""
    num_rows, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    hidden, weight = (torch.randn(n, D, device=device) for n in (num_rows, VOCAB_SIZE))
    leaves = [x.div_(D**0.25).to(dtype).requires_grad_() for x in (hidden, weight)]
    bias = torch.zeros(VOCAB_SIZE, device=device, dtype=dtype) if "bias" in flags else None
    targets = torch.randint(VOCAB_SIZE, (num_rows,), device=device)
    counters = torch.arange(num_rows, device=device)

    def plain():
        logits = F.linear(*leaves, bias).float()
        logits.argmax(-1)
        if samples:
            torch.multinomial(logits.detach().softmax(-1), 1)
        return F.cross_entropy(logits, targets, reduction="none")

    def ours(impl):
        if samples:
            given = (*leaves, targets, counters, counters)
            return linear_sample_cross_entropy(*given, bias_V=bias, impl=impl).loss
        return linear_cross_entropy(*leaves, targets, bias_V=bias, impl=impl).loss

    ways = {"plain": plain, "reference": partial(ours, "reference")}
    rivals = compiled_on_gpu(plain, device)
    if device == "cuda":
        ways["triton"] = partial(ours, "triton")
    if device == "cuda" and not samples:
        rivals |= other_projections(leaves, targets)
    return Case(leaves, ways, flops=6 * num_rows * VOCAB_SIZE * D, rivals=rivals)


def other_projections(leaves, targets) -> dict[str, Callable[[], Way]]:
    """Those of other packages, as far as they are installed."""

    def liger() -> Way:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as way

        return partial(way, *leaves, targets, reduction="none")

    def cut() -> Way:
        from cut_cross_entropy import linear_cross_entropy as way

        return partial(way, *leaves, targets, reduction="none")

    makers = {"liger_kernel": ("liger", liger), "cut_cross_entropy": ("cut_cross_entropy", cut)}
    return dict(named for module, named in makers.items() if importlib.util.find_spec(module))


OPERATIONS: dict[str, Callable[..., Case]] = {
    "relative_position_attention": attention_case,
    "linear_cross_entropy": partial(projection_case, samples=False),
    "linear_sample_cross_entropy": partial(projection_case, samples=True),
    "dropout_add_layer_norm": dropout_add_layer_norm_case,
    "feed_forward": feed_forward_case,
    "packed_linear": packed_linear_case,
    "dropout": dropout_case,
    "adamw": adamw_case,
}
ON_CPU = {
    "relative_position_attention": ["bias dropout", "causal dropout", "dropout", "bias positions"],
    "dropout_add_layer_norm": ["dropout"],
}


MOST_VALUED = (
    "relative_position_attention, bias dropout mask",
    "linear_cross_entropy, bias",
    "relative_position_attention, bias mask",
)
"""Of a GPU, where time may run out: training's attention, the loss, FlexAttention's rival."""


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """Name (operation, comma, optional inputs) and case; on a GPU all that kernels are used for."""
    flags = ON_CPU
    if device == "cuda":
        flags = {op: [" ".join(given) for given in sets] for op, sets in TRAINED.items()}
    found = {
        f"{op}, {given}" if given else op: partial(build, device, *given.split())
        for op, build in OPERATIONS.items()
        for given in flags.get(op, [""])
        if op != "dropout" or device == "cpu"
    }
    first = {name: found[name] for name in MOST_VALUED if name in found and device == "cuda"}
    return first | found
