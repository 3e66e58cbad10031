"""Peak memory of one GPU, by a formula.

With B examples of S encoder and T decoder tokens at a time, D width, I = H heads x their width, F
feed-forward width, V vocabulary, and N weights, training needs

    weights       4 N; in bf16 at most 2 N more: copies that autocast keeps until the gradients,
                  but not those of METRO's fused products
    gradients     4 N
    optimizer     8 N for AdamW; 4 x (rows + columns) of each matrix for Adafactor
    activations   for each encoder layer  B S (d D + f F + i I) + p B H S^2,
                  for each decoder layer  B T (d' D + f F + i' I) + 8 B S I + p B H (T^2 + T S);
                  with checkpointing 4 D for each token and layer, and one layer of those above
    loss          two chunks of logits

bytes. LoRA has gradients and optimizer states of the adapters alone. FSDP has a share of the first
three, and whole: two blocks of layers and the embeddings as they are computed with, and one block's
and the embeddings' gradients, so and once more in float32, to average them. The factors below count
the tensors that the layers keep for the backward pass, with dropout; those of attention weights (p)
and dropout are of the CPU and of attention without a fused kernel: with one a GPU needs less.
"""

from __future__ import annotations

from typing import NamedTuple

from metro.planning.sizes import Sizes, total

CHUNK = 2**26
"""Logits of a chunk, see `metro.ops.linear_cross_entropy`."""
NF4 = 0.516
"""Bytes of a weight in 4 bits: 64 of them share a constant in 8 bits."""


class Factors(NamedTuple):
    """Bytes that a layer keeps, see the top of the module."""

    encoder_width: int
    decoder_width: int
    feed_forward: int
    encoder_inner: int
    decoder_inner: int
    pairs: int
    adapters: tuple[int, int, int, int]
    """More with adapters: of encoder and decoder width, feed-forward width, and inner width."""


FACTORS = {  # is METRO, is half precision
    (False, False): Factors(32, 48, 32, 16, 24, 12, (24, 24, 4, 4)),
    (False, True): Factors(30, 45, 16, 14, 20, 12, (12, 12, 4, 4)),
    (True, False): Factors(18, 27, 4, 16, 24, 0, (24, 28, 8, 4)),
    (True, True): Factors(20, 28, 2, 14, 20, 12, (14, 16, 4, 4)),
}
PLAIN_FEED_FORWARD = 12, 7
"""T5's factor of F without a gate, in float32 and half precision."""
FUSED_FROM = 128
"""METRO's attention in float32 keeps its weights up to so many tokens."""


class Batch(NamedTuple):
    """What goes through a model at once."""

    examples: int
    source: int
    target: int


class Training(NamedTuple):
    """How a model is trained."""

    half: bool = True
    optimizer: str = "adafactor"
    checkpointing: bool = False
    accumulates: bool = False
    """Gradients are there before the backward pass."""
    shards: int = 1
    """Processes that share weights, gradients and optimizer states."""
    replicas: int = 1
    """Processes that each have all of them, with buckets to add up their gradients in."""
    offload: bool = False
    """The shards are in the CPU's memory."""
    lora_r: int = 0
    """Rank of adapters, the only weights that are trained; 0: all are."""
    load_in: str | None = None
    """Bits of the weights beside adapters."""


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    """With the loss, and what is there for a moment."""

    @property
    def total(self) -> float:
        return sum(self)


def stored(sizes: Sizes, bytes_each: float, load_in: str | None) -> float:
    """Bytes of the weights, those of linear layers rounded to ``load_in``."""
    if load_in is None:
        return bytes_each * sizes.weights
    kept = sizes.weights - sizes.rounded
    return bytes_each * kept + sizes.rounded * (1 if load_in == "8bit" else NF4)


def layers(sizes: Sizes, batch: Batch, half: bool, adapted: bool) -> tuple[float, float, float]:
    """Bytes that an encoder layer keeps, a decoder layer, and all layers share."""
    factors = FACTORS[sizes.is_metro, half]
    B, S, T = batch  # noqa: N806
    H, D, inner, F = sizes.heads, sizes.width, sizes.inner, sizes.feed_forward  # noqa: N806
    f = factors.feed_forward
    if not sizes.is_metro and not sizes.is_gated:
        f = PLAIN_FEED_FORWARD[half]
    more = factors.adapters if adapted else (0, 0, 0, 0)
    f, d, d2 = f + more[2], factors.encoder_width + more[0], factors.decoder_width + more[1]
    i, i2 = factors.encoder_inner + more[3], factors.decoder_inner + 2 * more[3]

    def pairs(queries: int, keys: int) -> int:
        is_short = sizes.is_metro and not half and queries * keys <= FUSED_FROM**2
        return (12 if is_short else factors.pairs) * B * H * queries * keys

    encoder = B * S * (d * D + f * F + i * inner) + pairs(S, S)
    decoder = B * T * (d2 * D + f * F + i2 * inner) + pairs(T, T) + pairs(T, S)
    decoder += B * S * (8 * inner + (16 * D if adapted else 0))
    bias = 0 if sizes.is_metro else 4 * B * H * (S * S + T * T)
    return encoder, decoder, bias


def whole(sizes: Sizes, how: Training) -> tuple[float, float, float, float]:
    """Bytes of all weights, gradients and optimizer states, and of what the optimizer computes."""
    matrices = sizes.adapters(how.lora_r) if how.lora_r else sizes.matrices()
    vectors = 0 if how.lora_r else sizes.vectors
    trained = total(matrices) + vectors
    weights = stored(sizes, 2 if how.load_in and how.half else 4, how.load_in)
    weights += 4 * trained if how.lora_r else 0
    largest = 4.0 * max(m.rows * m.columns for m in matrices)
    if "adafactor" not in how.optimizer:
        return weights, 4.0 * trained, 8.0 * trained, largest
    sides = sum((m.rows + m.columns) * m.count for m in matrices)
    return weights, 4.0 * trained, 4.0 * (sides + vectors), 3 * largest


def of_machine(sizes: Sizes, how: Training, processes: int) -> float:
    """Compute the peak of a machine's main memory, beside that of Python and CUDA.

    Each process loads the whole model in float32, or rounds one weight after the other on its GPU.
    Of those that share it one does, and gathers it to write it; with ``offload`` the shards stay.
    """
    if how.load_in:
        return 4.0 * sizes.embedding * processes
    loading = processes if how.shards == 1 else 1
    shards = sum(whole(sizes, how)[:3]) / how.shards * processes if how.offload else 0
    return max(4.0 * sizes.weights * loading, shards + 4.0 * sizes.weights)


def training(sizes: Sizes, batch: Batch, how: Training, chunk: int = CHUNK) -> Memory:
    """Compute the peak of an update after the first."""
    share = 0 if how.offload else 1 / how.shards
    *states, temporary = whole(sizes, how)
    weights, gradients, of_optimizer = (share * each for each in states)

    encoder, decoder, shared = layers(sizes, batch, how.half, bool(how.lora_r))
    B, S, T = batch  # noqa: N806
    depth = sizes.encoder_layers + sizes.auxiliary_layers
    if how.checkpointing:
        kept = 4.0 * sizes.width * B * (depth * S + sizes.decoder_layers * T)
        kept += max(encoder, decoder) + shared
    else:
        kept = depth * encoder + sizes.decoder_layers * decoder + shared
    copies = gathered = 0.0
    if how.shards > 1:
        root = sizes.embedding * (1 if sizes.is_tied else 2)
        computed = 2 if how.half else 4
        gathered = (2 * sizes.largest_block + root) * computed
        if not how.lora_r:  # gradients, before they are averaged and shared in float32
            gathered += (sizes.largest_block + root) * (computed + 4)
    elif how.half and not how.load_in:
        copies = 2.0 * (sizes.largest_block if how.lora_r and how.checkpointing else sizes.weights)
    if how.replicas > 1:
        gathered += gradients
    rows = B * T
    loss = 2 * 4.0 * min(chunk, rows * sizes.vocabulary) + (
        0 if how.lora_r else 4 * sizes.embedding
    )
    # Going back, activations make room for gradients; the last layer's are there with all of them.
    longest = max(S, T)
    moment = 4.0 * B * longest * (sizes.feed_forward + 3 * sizes.heads * longest)
    begin = kept + copies + loss + moment + (gradients if how.accumulates else 0)
    end = gradients + max(encoder + copies + moment, temporary)
    return Memory(weights, gradients, of_optimizer, gathered + max(begin, end) - gradients)


def inference(sizes: Sizes, batch: Batch, bytes_each: int, load_in: str | None = None) -> Memory:
    """Compute the peak of scoring a batch."""
    B, S, T = batch  # noqa: N806
    longest, tokens = max(S, T), B * max(S, T)
    working = tokens * bytes_each * (6 * sizes.width + 3 * sizes.feed_forward)
    working += tokens * bytes_each * 2 * sizes.inner * sizes.decoder_layers  # keys and values
    if not sizes.is_metro:  # weights of attention, in float32 and as they are
        working += tokens * sizes.heads * longest * (4 + 2 * bytes_each)
    working += 4 * 2**24  # a block of logits
    return Memory(stored(sizes, bytes_each, load_in), activations=working)
