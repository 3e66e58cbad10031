"""Cross-entropy of a projection to the vocabulary, without the logits of more than a chunk of rows.

The logits of N rows are N V numbers, and a training step holds several copies of them: 1 GiB each
at 8k tokens and 32k words in float32. Here a chunk of rows is projected, reduced to a few numbers a
row, and projected again in the backward pass (as Wijmans et al., 2025, do inside a GPU kernel). The
last chunk is kept, so that a problem of one chunk is not projected twice.

Floor: 2 N V D multiplications and additions forward and 6 N V D backward (4 where one chunk is
all); memory one chunk of logits and the gradients of the inputs.

Shapes: N rows (tokens), D width, V vocabulary, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**24
"""Logits at a time: 64 MiB in float32, 512 rows of a vocabulary of 32k."""


class LinearCrossEntropy(NamedTuple):
    """What :func:`linear_cross_entropy` returns, in the shape of the targets."""

    loss: torch.Tensor
    """float32 (float64 for float64 inputs), times the token's weight; 0 at ignored targets."""
    correct: torch.Tensor
    """bool, whether the target is the most likely token; False at ignored targets."""


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
            likely; 0.01 in FLIPPED (Ye et al., 2023, equation 4).
        impl: ``reference`` (described above), or ``auto``, the best that the device has.

    Raises:
        ValueError: shapes or types that do not fit, a target outside the vocabulary (on the CPU),
            an unknown ``impl``.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl is {impl!r}; use 'auto' or 'reference'")
    check_options(label_smoothing, unlikelihood_epsilon)
    hidden_ND, weight_VD, bias_V = cast_for_autocast(hidden_ND, weight_VD, bias_V)
    check_inputs(hidden_ND, weight_VD, target_ids_N, bias_V, token_weight_N)

    shape, on_cpu = target_ids_N.shape, hidden_ND.device.type == "cpu"
    hidden_ND, targets_N = hidden_ND.flatten(0, -2), target_ids_N.flatten()
    kept_N = targets_N != ignore_index
    # Looking which rows are kept would wait for other devices.
    rows = None if not on_cpu or kept_N.all() else kept_N.nonzero().squeeze(-1)
    if rows is not None:
        hidden_ND, targets_N = hidden_ND[rows], targets_N[rows]
    elif not on_cpu:
        targets_N = targets_N.where(kept_N, 0)
    if on_cpu:
        check_targets(targets_N, len(weight_VD), ignore_index)

    loss, correct = ChunkedCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, targets_N, label_smoothing, unlikelihood_epsilon
    )
    if rows is not None:
        loss = loss.new_zeros(len(kept_N)).index_copy(0, rows, loss)
        correct = torch.zeros_like(kept_N).index_copy(0, rows, correct)
    elif not on_cpu:
        loss, correct = loss.where(kept_N, 0.0), correct & kept_N
    if token_weight_N is not None:
        loss = loss * token_weight_N.flatten().to(loss.dtype)
    return LinearCrossEntropy(loss.view(shape), correct.view(shape))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and correctness of N rows; of each row its normaliser is kept, and the last chunk."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, smoothing, epsilon):
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss_N, normaliser_N = (torch.empty_like(targets_N, dtype=dtype) for _ in range(2))
        others_N = None if epsilon is None else torch.empty_like(loss_N)
        correct_N, logits_CV = torch.empty_like(targets_N, dtype=torch.bool), None
        for chunk in chunks(len(targets_N), len(weight_VD)):
            logits_CV = project(hidden_ND[chunk], weight_VD, bias_V)
            sums = reduce_rows(logits_CV, targets_N[chunk], smoothing, epsilon)
            loss_N[chunk], normaliser_N[chunk] = sums.loss, sums.normaliser
            correct_N[chunk] = sums.correct
            if others_N is not None:
                others_N[chunk] = sums.others
        ctx.save_for_backward(
            hidden_ND, weight_VD, bias_V, targets_N, normaliser_N, others_N, logits_CV
        )
        ctx.smoothing, ctx.epsilon = smoothing, epsilon
        ctx.mark_non_differentiable(correct_N)
        return loss_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, bias_V, targets_N, normaliser_N, others_N, last_CV = ctx.saved_tensors
        num_rows, dtype = len(targets_N), normaliser_N.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        # Summed over chunks in float32: half precision would round once for each of them.
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
        for chunk in chunks(num_rows, len(weight_VD)):
            is_last = chunk.stop >= num_rows
            logits_CV = last_CV if is_last else project(hidden_ND[chunk], weight_VD, bias_V)
            others_C = None if others_N is None else others_N[chunk]
            grad_CV = logits_gradient(
                logits_CV,
                targets_N[chunk],
                normaliser_N[chunk],
                others_C,
                ctx.smoothing,
                ctx.epsilon,
            ).mul_(grad_N[chunk].unsqueeze(-1))
            if needs_bias:
                grad_bias += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if needs_hidden:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[chunk])
            if needs_weight and dtype == hidden_ND.dtype:
                grad_weight.addmm_(grad_CV.T, hidden_ND[chunk])
            elif needs_weight:
                grad_weight += grad_CV.T @ hidden_ND[chunk]
        grad_weight = None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class RowSums(NamedTuple):
    """What is known of each row of a chunk once its logits have been seen."""

    loss: torch.Tensor
    correct: torch.Tensor
    normaliser: torch.Tensor
    """log of the sum of the exponentials."""
    others: torch.Tensor | None
    """``1 - p_target``, the share of the other tokens; the unlikelihood's alone."""


def reduce_rows(logits_CV, targets_C, smoothing, epsilon) -> RowSums:
    """Loss, correctness, and what the backward pass needs, of one chunk."""
    targets_C1 = targets_C.unsqueeze(-1)
    target_logits_C1 = logits_CV.gather(-1, targets_C1)
    correct_C = logits_CV.argmax(-1) == targets_C
    if epsilon is not None:
        log_others_C = logits_CV.scatter_(-1, targets_C1, -torch.inf).logsumexp(-1)
        logits_CV.scatter_(-1, targets_C1, target_logits_C1)
        normaliser_C = torch.logaddexp(log_others_C, target_logits_C1.squeeze(-1))
        others_C = (log_others_C - normaliser_C).exp()
        return RowSums(-(others_C + epsilon).log(), correct_C, normaliser_C, others_C)
    normaliser_C = logits_CV.logsumexp(-1)
    loss_C = normaliser_C - target_logits_C1.squeeze(-1)
    if smoothing:
        vocab_size = logits_CV.shape[-1]
        share = smoothing / (vocab_size - 1)
        loss_C = (1.0 - smoothing - share) * loss_C
        loss_C += share * (vocab_size * normaliser_C - logits_CV.sum(-1))
    return RowSums(loss_C, correct_C, normaliser_C, None)


def logits_gradient(logits_CV, targets_C, normaliser_C, others_C, smoothing, epsilon):
    """Gradient of each row's loss, with ``p`` the softmax and ``1`` the target's indicator.

    ``p - (1 - e - s) 1 - s`` for the smoothed loss (see :func:`linear_cross_entropy`), and
    ``p_target / (1 - p_target + epsilon) * (1 - p)`` for the unlikelihood.
    """
    targets_C1 = targets_C.unsqueeze(-1)
    grad_CV = (logits_CV - normaliser_C.unsqueeze(-1)).exp_()
    if epsilon is not None:
        others_C1 = others_C.unsqueeze(-1)
        slope_C1 = grad_CV.gather(-1, targets_C1) / (others_C1 + epsilon)
        return grad_CV.mul_(-slope_C1).scatter_(-1, targets_C1, slope_C1 * others_C1)
    share = smoothing / (logits_CV.shape[-1] - 1) if smoothing else 0.0
    if smoothing:
        grad_CV.sub_(share)
    to_target_C1 = torch.full_like(targets_C1, share + smoothing - 1.0, dtype=grad_CV.dtype)
    return grad_CV.scatter_add_(-1, targets_C1, to_target_C1)


def project(hidden_CD, weight_VD, bias_V) -> torch.Tensor:
    """Logits in at least float32; a product of half precision rounds them before."""
    logits_CV = F.linear(hidden_CD, weight_VD, bias_V)
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))


def chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of as many rows as have ``CHUNK_LOGITS`` logits, and at least one."""
    step = max(1, CHUNK_LOGITS // vocab_size)
    return (slice(first, first + step) for first in range(0, num_rows, step))


def cast_for_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """As ``F.linear`` does inside ``torch.autocast``; the gradients are cast back."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in tensors]


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


def check_inputs(hidden, weight, targets, bias, token_weight) -> None:
    """Shapes and types that fit each other."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit; use (N, D), (V, D) and (N,)"
        )
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        types = [str(x.dtype) for x in (hidden, weight, bias) if x is not None]
        raise ValueError(f"hidden, weight and bias are {', '.join(types)}; cast them to one type")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; use ({len(weight)},)")
    if token_weight is not None and token_weight.shape != targets.shape:
        raise ValueError(
            f"token_weight has shape {tuple(token_weight.shape)}; use that of the targets, "
            f"{tuple(targets.shape)}"
        )


def check_targets(targets_N: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Every target is a word."""
    if not len(targets_N):
        return
    low, high = (int(x) for x in targets_N.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"target {wrong} is outside the vocabulary of {vocab_size}; ignore_index is "
            f"{ignore_index}"
        )
