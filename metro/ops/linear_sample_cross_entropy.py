"""The auxiliary model's head in one pass: loss, correctness and a sample of each masked token.

Gong et al. (ACL 2023), section 3.1: the auxiliary model is trained at masked positions, and its
samples there corrupt the main model's input. As in :mod:`metro.ops.linear_cross_entropy` the logits
exist for a chunk of rows at a time, or with ``triton`` not at all.

Lower bound: that of :mod:`metro.ops.linear_cross_entropy`; a sample costs one more pass over a
chunk of logits, or with ``triton`` seven rounds of Philox for each logit.

Shapes: N rows (masked tokens), D width, V vocabulary.
"""

from typing import NamedTuple

import torch

from metro.ops.linear_cross_entropy import losses_and_samples
from metro.ops.sampling import counter_bits


class LinearSampleCrossEntropy(NamedTuple):
    """Result of :func:`linear_sample_cross_entropy`, in the shape of the targets."""

    loss: torch.Tensor
    """float32 (float64 for float64 inputs); 0 at ignored targets."""
    correct: torch.Tensor
    """bool, True where the target is the most probable token; False at ignored targets."""
    samples: torch.Tensor
    """int64, a token drawn from the softmax, at ignored targets too."""


def linear_sample_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_ids_N: torch.Tensor,
    seeds_N: torch.Tensor,
    counters_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> LinearSampleCrossEntropy:
    """Loss, correctness and a sample of each token. In PyTorch::

        logits = F.linear(hidden, weight, bias).float()
        loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
        correct = logits.argmax(-1) == target
        samples = torch.multinomial(logits.softmax(-1), 1)

    Differentiable in ``hidden``, ``weight`` and ``bias``; samples have no gradient. A sample is a
    function of its row's logits, seed and counter, whatever batch the row is in; ``triton`` draws
    others than ``plain`` and ``reference``.

    Args:
        hidden_ND: hidden states; any leading shape.
        weight_VD: rows of the projection, in the same type.
        target_ids_N: int64 token ids, in hidden's leading shape.
        seeds_N, counters_N: int64, broadcast to the targets' shape; a seed for each row and step,
            and the token's position, say.
        bias_V: of the projection.
        ignore_index: the target of positions without loss.
        impl: ``plain`` and ``reference`` (invert the distribution), ``triton`` (adds Gumbel noise),
            or ``auto``, as in :func:`metro.ops.linear_cross_entropy.linear_cross_entropy`.

    Raises:
        ValueError: shapes or types that do not fit, a target outside the vocabulary (on the CPU),
            an unknown ``impl``.
    """
    streams = counter_bits(seeds_N, counters_N)
    try:
        streams_N = streams.expand(target_ids_N.shape).flatten()
    except RuntimeError:
        raise ValueError(
            f"seeds {tuple(seeds_N.shape)} and counters {tuple(counters_N.shape)} do not broadcast "
            f"to the targets' {tuple(target_ids_N.shape)}"
        ) from None
    return LinearSampleCrossEntropy(
        *losses_and_samples(
            hidden_ND,
            weight_VD,
            target_ids_N,
            bias_V,
            ignore_index,
            label_smoothing=0.0,
            epsilon=None,
            streams_N=streams_N,
            impl=impl,
        )
    )
