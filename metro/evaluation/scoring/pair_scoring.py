"""Log-probabilities of targets given sources, none computed twice.

Shared are: the encoding of a source by all its targets (a channel's source "Yes" serves a whole
task), the decoder's first step and the keys and values that it makes of the source, a hidden state
by the options that begin there, a pair that turns up again. Pairs are batched by length within a
budget of tokens, so that the result does not depend on their order. The vocabulary's logits exist
for a chunk of rows only.

METRO models on the CPU are served by ``packed_scoring.py``, which shares more.

Letters: U sources, P pairs, S source tokens, T target tokens, D width, R rows of the projection,
N target tokens of all pairs.
"""

from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from metro.evaluation.scoring.packed_scoring import can_pack, decode_packed
from metro.evaluation.scoring.pair_batches import (
    Batch,
    Pair,
    group_batches,
    make_batches,
    make_packed_batches,
)
from metro.evaluation.scoring.target_projection import DecodedRows, Projector
from metro.models.projection import projection_input
from metro.utils.messages import UserError

IGNORED = -100


def pad(rows: Sequence[Sequence[int]], value: int, device) -> torch.Tensor:
    """Rows of ids as one tensor, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


@torch.inference_mode()
def decode_batch(model, batch: Batch):
    """Hidden states that predict the targets of a batch, and the projection's weight and bias."""
    device, config = model.device, model.config
    start, filler = config.decoder_start_token_id, config.pad_token_id
    source_ids_US = pad(batch.sources, filler, device)
    lengths_U = torch.tensor([len(source) for source in batch.sources], device=device)
    mask_US = torch.arange(source_ids_US.shape[1], device=device) < lengths_U[:, None]
    mask_US = mask_US.long()
    encoded = model.get_encoder()(input_ids=source_ids_US, attention_mask=mask_US, return_dict=True)
    owner_P = torch.tensor([owner for owner, _ in batch.pairs], device=device)
    targets = [target for _, target in batch.pairs]
    target_ids_PT = pad(targets, IGNORED, device)
    if len(batch.pairs) > len(batch.sources):
        return decode_shared_sources(model, encoded, mask_US, owner_P, targets, target_ids_PT)
    # Nothing to share behind the encoder. One row of ids serves all where they are alike.
    rows = targets[:1] if len(set(targets)) == 1 else targets
    input_ids_PT = pad([[start, *row[:-1]] for row in rows], filler, device)
    hidden_PTD, weight, bias = projection_input(
        model,
        encoder_outputs=encoded,
        attention_mask=mask_US,
        decoder_input_ids=input_ids_PT.expand(len(targets), -1),
    )
    pair_N, place_N = (target_ids_PT != IGNORED).nonzero(as_tuple=True)
    row_N = torch.arange(len(pair_N), device=device)
    rows = DecodedRows(hidden_PTD[pair_N, place_N], row_N, target_ids_PT[pair_N, place_N], pair_N)
    return rows, weight, bias


def decode_shared_sources(model, encoded, mask_US, owner_P, targets, target_ids_PT):
    """:func:`decode_batch` where sources have several targets each.

    The first decoder step, which reads the start symbol, is run once per source and leaves the keys
    and values of the source behind; the other steps take copies of them.
    """
    num_sources, start = len(mask_US), model.config.decoder_start_token_id
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first_U1D, weight, bias = projection_input(
        model,
        encoder_outputs=encoded,
        attention_mask=mask_US,
        decoder_input_ids=mask_US.new_full((num_sources, 1), start),
        past_key_values=cache,
        use_cache=True,
    )
    pair_P = torch.arange(len(targets), device=mask_US.device)
    first = DecodedRows(first_U1D[:, 0], owner_P, target_ids_PT[:, 0], pair_P)
    if target_ids_PT.shape[1] == 1:
        return first, weight, bias
    cache.batch_select_indices(owner_P)
    hidden_PTD, weight, bias = projection_input(
        model,
        encoder_outputs=BaseModelOutput(encoded[0][owner_P]),
        attention_mask=mask_US[owner_P],
        decoder_input_ids=pad(
            [target[:-1] or target for target in targets], model.config.pad_token_id, mask_US.device
        ),
        past_key_values=cache,
        use_cache=True,
    )
    pair_N, place_N = (target_ids_PT[:, 1:] != IGNORED).nonzero(as_tuple=True)
    hidden_ND = hidden_PTD[pair_N, place_N]
    row_N = num_sources + torch.arange(len(pair_N), device=mask_US.device)
    rows = DecodedRows(
        torch.cat([first.hidden_RD, hidden_ND]),
        torch.cat([first.row_N, row_N]),
        torch.cat([first.target_N, target_ids_PT[pair_N, place_N + 1]]),
        torch.cat([first.pair_N, pair_N]),
    )
    return rows, weight, bias


class PairScorer:
    """Scores pairs, each distinct one once.

    Args:
        model: any sequence-to-sequence model of Hugging Face, in eval mode.
        batch_tokens: tokens of a batch, padding included.
        rank, num_processes: which share of the batches is this process's.
        gather: adds up a float64 tensor over the processes.
    """

    def __init__(
        self,
        model,
        *,
        batch_tokens: int = 4096,
        rank: int = 0,
        num_processes: int = 1,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}; use at least 1")
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise UserError(
                f"{type(model).__name__} has no decoder_start_token_id in its configuration; set it"
            )
        self.model, self.batch_tokens = model, batch_tokens
        self.rank, self.num_processes, self.gather = rank, num_processes, gather
        self.known: dict[Pair, float] = {}
        self.num_computed = 0

    def forget(self) -> None:
        """Drop the remembered scores, e.g. where another task begins."""
        self.known.clear()

    def score(
        self, pairs: Sequence[Pair], *, progress: Callable[[float], None] | None = None
    ) -> list[float]:
        """log P(target | source) of every pair; ``progress`` is told the share that is done."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        # Shared out by groups, which do not depend on the number of processes: nor do the scores,
        # to the last bit where all compute with as many threads (a product's sums may be taken in
        # another order with more).
        packs = can_pack(self.model)
        batches = (make_packed_batches if packs else make_batches)(new, self.batch_tokens)
        groups = group_batches(batches)
        places = {pair: number for number, pair in enumerate(new)}
        scores = torch.zeros(len(new), dtype=torch.float64)
        done, size = 0, sum(len(pair.source) + len(pair.target) for pair in new)
        for number, group in enumerate(groups):
            projector = Projector(scores)
            for batch in group:
                if number % self.num_processes == self.rank:
                    index = [places[Pair(batch.sources[owner], t)] for owner, t in batch.pairs]
                    decode = decode_packed if packs else decode_batch
                    rows, weight, bias = decode(self.model, batch)
                    projector.add(rows, index, weight, bias)
                if progress is not None:
                    done += sum(len(t) + len(batch.sources[owner]) for owner, t in batch.pairs)
                    progress(done / size)
            projector.flush()
        if self.gather is not None:
            scores = self.gather(scores)
        self.num_computed += len(new)
        self.known.update(zip(new, scores.tolist(), strict=True))
        return [self.known[pair] for pair in pairs]
