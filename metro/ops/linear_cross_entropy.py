"""Cross-entropy of a projection to the vocabulary, without the logits of more than a chunk of rows.

The logits of N rows are N V numbers, and a training step holds several copies of them: 1 GiB each
at 8k rows and a vocabulary of 32k in float32. Here a chunk of rows is projected, reduced to a few
numbers a row, and projected again in the backward pass (as Wijmans et al., 2025, do inside a GPU
kernel). The last chunk is kept, so that a problem of one chunk is not projected twice.

Going back each chunk adds to the gradient of the weight, in float32: it reads and writes 8 V D
bytes, 201 MB at V = 32k and D = 768. Hence the larger chunks on GPUs, 2 ** 26 logits: 8k rows
of 32k are 4 chunks and move 0.8 GB of it; of 2 ** 24 logits they were 16 and moved 3.2 GB.

Lower bound: 2 N V D FLOPs forward and 6 N V D backward (4 where one chunk is
all); memory one chunk of logits and the gradients of the inputs.

Shapes: N rows (tokens), D width, V vocabulary, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from metro.ops.dispatch import (
    cast_for_autocast,
    check_kernel,
    check_one_type,
    computed_type,
    takes_kernel,
)
from metro.ops.linear import linear, linear_into
from metro.ops.linear_cross_entropy_rows import (
    Coefficients,
    RowSums,
    in_cache,
    logits_gradient,
    sums_of_chunk,
    widened,
)
from metro.ops.sampling import sample_tokens, uniform_of

CHUNK_LOGITS = 2**25
"""Logits at a time on the CPU: 128 MiB in float32, 1,024 rows of a vocabulary of 32k."""
CUDA_CHUNK_LOGITS = 2**26
"""On GPUs: 256 MiB, 2,048 such rows. The weight's gradient is read and written for each chunk."""


class LinearCrossEntropy(NamedTuple):
    """Result of :func:`linear_cross_entropy`, in the shape of the targets."""

    loss: torch.Tensor
    """float32 (float64 for float64 inputs), times the token's weight; 0 at ignored targets."""
    correct: torch.Tensor
    """bool, True where the target is the most probable token; False at ignored targets."""


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_ids_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    ignore_index: int = -100,
    token_weight_N: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    unlikelihood_epsilon: float | None = None,
    impl: str = "auto",
) -> LinearCrossEntropy:
    """Each token's loss. In PyTorch, with ``e`` the smoothing and ``s = e / (V - 1)``::

        logits = F.linear(hidden, weight, bias).float()
        log_p = logits.log_softmax(-1)
        log_p_target = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        loss = -(1 - e - s) * log_p_target - s * log_p.sum(-1)
        if unlikelihood_epsilon is not None:
            loss = -log(1 - exp(log_p_target) + unlikelihood_epsilon)
        loss = (loss * token_weight).where(target != ignore_index, 0)
        correct = logits.argmax(-1) == target

    Differentiable in ``hidden``, ``weight``, ``bias`` and ``token_weight``. Sums over the
    vocabulary are of float32; ``1 - p`` is the share of the other tokens, so that it loses no
    digits as p goes to 1.

    Args:
        hidden_ND: hidden states; any leading shape.
        weight_VD: rows of the projection (the embedding where they are tied), in the same type.
        target_ids_N: int64 token ids, in hidden's leading shape.
        bias_V: of the projection.
        ignore_index: the target of positions without loss; on the CPU they cost nothing.
        token_weight_N: factor of each token's loss, METRO's ``w_i``.
        label_smoothing: probability taken from the target and given to the others in equal shares.
        unlikelihood_epsilon: the loss of Welleck et al. (2020) instead, which makes the target less
            probable; 0.01 in FLIPPED (Ye et al., 2023, equation 4).
        impl: ``plain`` (the formula), ``reference`` (described above), ``triton`` (one kernel
            projects and reduces, so that forward no logits exist at all), or ``auto``: ``plain``
            inside ``torch.compile``, ``triton`` where :func:`metro.ops.dispatch.takes_kernel` says
            so, and else ``reference``.

    Raises:
        ValueError: shapes or types that do not fit, a target outside the vocabulary (on the CPU),
            an unknown ``impl``.
    """
    loss, correct, _ = losses_and_samples(
        hidden_ND,
        weight_VD,
        target_ids_N,
        bias_V,
        ignore_index,
        label_smoothing,
        unlikelihood_epsilon,
        streams_N=None,
        impl=impl,
    )
    if token_weight_N is not None:
        if token_weight_N.shape != target_ids_N.shape:
            raise ValueError(
                f"token_weight has shape {tuple(token_weight_N.shape)}; use that of the targets, "
                f"{tuple(target_ids_N.shape)}"
            )
        loss = loss * token_weight_N.to(loss.dtype)
    return LinearCrossEntropy(loss, correct)


def losses_and_samples(
    hidden, weight, targets, bias, ignore_index, label_smoothing, epsilon, streams_N, impl
):
    """Compute loss, correctness and, with ``streams_N``, a sample for each token."""
    if impl == "auto":
        impl = choose_impl(hidden, bias is not None, streams_N is not None)
    if impl not in ("plain", "reference", "triton"):
        raise ValueError(f"impl is {impl!r}; use 'auto', 'plain', 'reference' or 'triton'")
    check_options(label_smoothing, epsilon)
    if impl == "plain":
        hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    else:  # rounds the others where it needs them
        (hidden,) = cast_for_autocast(hidden)
    check_inputs(hidden, weight, targets, bias)
    if impl == "triton":
        check_kernel(hidden)
    shape, on_cpu = targets.shape, hidden.device.type == "cpu"
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    kept_N, rows = targets != ignore_index, None
    # Looking up which rows are kept would synchronise with a GPU, and end a compiled graph.
    if on_cpu and not torch.compiler.is_compiling():
        rows = kept_N.nonzero().squeeze(-1) if not kept_N.all() else None
        check_targets(targets[kept_N], len(weight), ignore_index)
    if rows is not None and streams_N is None:
        hidden, targets = hidden[rows], targets[rows]
    else:
        rows, targets = None, targets.where(kept_N, 0)

    options = Options(label_smoothing, epsilon, impl)
    compute = plain_losses if impl == "plain" else ChunkedCrossEntropy.apply
    loss, correct, samples = compute(hidden, weight, bias, targets, streams_N, options)
    if rows is not None:
        loss = loss.new_zeros(len(kept_N)).index_copy(0, rows, loss)
        correct = torch.zeros_like(kept_N).index_copy(0, rows, correct)
    loss, correct = loss.where(kept_N, 0.0).view(shape), (correct & kept_N).view(shape)
    return loss, correct, None if samples is None else samples.view(shape)


def choose_impl(hidden: torch.Tensor, has_bias: bool, samples: bool) -> str:
    """What ``auto`` means; the compiler is left to write its own."""
    if torch.compiler.is_compiling():
        return "plain"
    op = "linear_sample_cross_entropy" if samples else "linear_cross_entropy"
    dtype, flags = computed_type(hidden), ["bias"] * has_bias
    takes_it = takes_kernel(op, hidden.device, dtype, hidden.shape[-1], *flags)
    return "triton" if takes_it else "reference"


class Options(NamedTuple):
    """The loss, and the way to compute it."""

    smoothing: float
    epsilon: float | None
    impl: str


def plain_losses(hidden_ND, weight_VD, bias_V, targets_N, streams_N, options):
    """The formula of :func:`linear_cross_entropy` as it stands."""
    logits_NV = widened(F.linear(hidden_ND, weight_VD, bias_V))
    log_p_NV = logits_NV.log_softmax(-1)
    log_p_N = log_p_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    if options.epsilon is not None:
        loss_N = -(1.0 - log_p_N.exp() + options.epsilon).log()
    else:
        share = options.smoothing / (len(weight_VD) - 1) if options.smoothing else 0.0
        loss_N = -(1.0 - options.smoothing - share) * log_p_N
        if options.smoothing:
            loss_N = loss_N - share * log_p_NV.sum(-1)
    samples_N = None
    if streams_N is not None:
        samples_N = sample_tokens(logits_NV.detach(), uniform_of(streams_N))
    return loss_N, logits_NV.argmax(-1) == targets_N, samples_N


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and correctness of N rows; a few sums of each row are kept, and the last chunk.

    Weight and bias are rounded here to the type of ``hidden``, under autocast: the rounded ones are
    not kept.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, streams_N, options):
        given = (hidden_ND, *rounded(hidden_ND.dtype, weight_VD, bias_V))
        reduce_rows = reduce_in_chunks
        if options.impl == "triton":
            from metro.ops.kernels.linear_cross_entropy import reduce_rows
        rows, samples_N, last_CV = reduce_rows(
            *given, targets_N, streams_N, needs_sum=bool(options.smoothing)
        )
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, last_CV, *rows[:4])
        ctx.options, ctx.is_spent = options, False
        correct_N = rows.most_probable == targets_N
        ctx.mark_non_differentiable(correct_N)
        if samples_N is not None:
            ctx.mark_non_differentiable(samples_N)
        return loss_of(rows, len(weight_VD), options), correct_N, samples_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, *_):
        hidden_ND, weight_VD, bias_V, targets_N, last_CV, *rows = ctx.saved_tensors
        num_rows, vocab_size, dtype = len(targets_N), len(weight_VD), grad_N.dtype
        coefficients = gradient_coefficients(
            RowSums(*rows, most_probable=None), grad_N, vocab_size, ctx.options
        )
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        weight_dtype, grad_weight = weight_VD.dtype, None
        weight_VD, bias_V = rounded(hidden_ND.dtype, weight_VD, bias_V)
        # Summed over chunks in float32: half precision would round once for each of them.
        grad_bias = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
        for chunk in chunks(num_rows, weight_VD):
            given = (hidden_ND[chunk], weight_VD, bias_V, targets_N[chunk])
            of_chunk = Coefficients(*(x[chunk] for x in coefficients))
            if ctx.options.impl == "triton":
                from metro.ops.kernels.linear_cross_entropy import logits_gradient_of_rows

                grad_CV = logits_gradient_of_rows(*given, of_chunk)
            else:
                is_kept = chunk.stop >= num_rows and not ctx.is_spent
                logits_CV = last_CV.data if is_kept else linear(*given[:3])
                grad_CV = logits_gradient(logits_CV, targets_N[chunk], of_chunk)
            if needs_bias:
                grad_bias += grad_CV.sum(0, dtype=dtype)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if needs_hidden:
                linear_into(grad_hidden[chunk], grad_CV, weight_VD.T)
            if needs_weight and grad_weight is not None and dtype == hidden_ND.dtype:
                grad_weight.addmm_(grad_CV.T, hidden_ND[chunk])
            elif needs_weight:
                of_chunk_VD = (grad_CV.T @ hidden_ND[chunk]).to(dtype)
                grad_weight = of_chunk_VD if grad_weight is None else grad_weight.add_(of_chunk_VD)
        ctx.is_spent = True  # the last chunk holds its gradient now: a second pass projects again
        grad_weight = None if grad_weight is None else grad_weight.to(weight_dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(weight_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def rounded(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list:
    return [None if x is None else x.to(dtype) for x in tensors]


def loss_of(rows: RowSums, vocab_size: int, options: Options) -> torch.Tensor:
    """The formula of :func:`linear_cross_entropy`, before weights."""
    if options.epsilon is not None:
        return -(rows.others + options.epsilon).log()
    loss_N = rows.normaliser - rows.target_logit
    if options.smoothing:
        assert rows.logit_sum is not None
        share = options.smoothing / (vocab_size - 1)
        to_all_N = vocab_size * rows.normaliser - rows.logit_sum
        loss_N = (1.0 - options.smoothing - share) * loss_N + share * to_all_N
    return loss_N


def gradient_coefficients(
    rows: RowSums, grad_N: torch.Tensor, vocab_size: int, options: Options
) -> Coefficients:
    """Derive the coefficients of each row; with ``p`` the softmax, ``1`` the target's indicator,
    the gradient of its loss is

    ``p - (1 - e - s) 1 - s`` for the smoothed loss (see :func:`linear_cross_entropy`), and
    ``p_target / (1 - p_target + epsilon) * (1 - p)`` for the unlikelihood.
    """
    log_p_N = rows.target_logit - rows.normaliser
    if options.epsilon is not None:
        slope_N = grad_N * log_p_N.exp() / (rows.others + options.epsilon)
        zeros = torch.zeros_like(grad_N)
        return Coefficients(-slope_N, zeros, slope_N * rows.others, rows.normaliser)
    share = options.smoothing / (vocab_size - 1) if options.smoothing else 0.0
    at_target_N = grad_N * (options.smoothing - rows.others)
    return Coefficients(grad_N, -share * grad_N, at_target_N, rows.normaliser)


def reduce_in_chunks(hidden_ND, weight_VD, bias_V, targets_N, streams_N, needs_sum):
    """Compute sums and samples of all rows, and the last chunk's logits."""
    parts, samples, logits_CV = [], [], None
    for chunk in chunks(len(targets_N), weight_VD):
        logits_CV = linear(hidden_ND[chunk], weight_VD, bias_V)
        parts += sums_of_chunk(logits_CV, targets_N[chunk], needs_sum)
        if streams_N is not None:
            uniform_C = uniform_of(streams_N[chunk])
            few_rows = in_cache(logits_CV)
            samples += [sample_tokens(widened(logits_CV[x]), uniform_C[x]) for x in few_rows]
    rows = RowSums(
        *(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    )
    return rows, torch.cat(samples) if samples else None, logits_CV


def chunks(num_rows: int, weight_VD: torch.Tensor) -> Iterator[slice]:
    """Yield slices of as many rows as make a chunk; at least one slice of at least one row."""
    logits = CUDA_CHUNK_LOGITS if weight_VD.device.type == "cuda" else CHUNK_LOGITS
    step = max(1, logits // len(weight_VD))
    return (slice(first, first + step) for first in range(0, max(num_rows, 1), step))


def check_options(label_smoothing: float, unlikelihood_epsilon: float | None) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; use a number in [0, 1)")
    if unlikelihood_epsilon is None:
        return
    if label_smoothing:
        raise ValueError(
            f"label_smoothing {label_smoothing} has no meaning with unlikelihood_epsilon "
            f"{unlikelihood_epsilon}; use one of them"
        )
    if not unlikelihood_epsilon > 0.0:
        raise ValueError(
            f"unlikelihood_epsilon is {unlikelihood_epsilon}; use a positive number, as 0.01"
        )


def check_inputs(hidden, weight, targets, bias) -> None:
    """Check that shapes and types fit each other."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit; use (N, D), (V, D) and (N,)"
        )
    check_one_type(hidden, weight, bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; use ({len(weight)},)")


def check_targets(targets_N: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Check that every target is in ``[0, vocab_size)``; ignored ones are not among them."""
    if not len(targets_N):
        return
    low, high = (int(x) for x in targets_N.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"target {wrong} is outside the vocabulary of {vocab_size}; ignore_index is "
            f"{ignore_index}"
        )
