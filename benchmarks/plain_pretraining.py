"""The plain way to train METRO, as the original computes it; the slow side of `pretraining.py`.

Every position is projected to the vocabulary with float32 log-probabilities, last layers are
computed whole, the relative bias is looked up for every query-key pair and repeated over batch and
heads, attention weights are materialised.
"""

from functools import cache
from types import MethodType

import torch
import torch.nn.functional as F

from metro.modeling.attention_metro_t5 import Attention, relative_position_buckets
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel, T5PretrainingModel


def plain_attend(q, k, v, bias_HTT, visibility, dropout, return_weights=True):
    """Attention with weights, and with a bias that is repeated over the batch."""
    scale = q.shape[-1] ** -0.5
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q * scale, k, v))
    if bias_HTT is not None:
        scores = torch.baddbmm(bias_HTT.repeat(len(q), 1, 1), flat_q, flat_k.transpose(1, 2))
    else:
        scores = torch.bmm(flat_q, flat_k.transpose(1, 2))
    if visibility.is_causal:
        scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
    if visibility.key_mask is not None:
        hidden = ~visibility.key_mask[:, None, None]
        by_row = scores.unflatten(0, q.shape[:2]).masked_fill(hidden, float("-inf"))
        scores = by_row.flatten(0, 1)
    weights = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(weights, flat_v).unflatten(0, q.shape[:2]), None


def plain_bias(attention, length: int) -> torch.Tensor | None:
    """H,T,T: one lookup for every query-key pair."""
    if attention.relative_attention_bias is None:
        return None
    config, table = attention.config, attention.relative_attention_bias
    pairs_TT = buckets_of_pairs(
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        length,
        table.weight.device,
    )
    return F.embedding(pairs_TT, table.weight).permute(2, 0, 1).contiguous()


@cache
def buckets_of_pairs(num_buckets: int, max_distance: int, length: int, device) -> torch.Tensor:
    """T,T, once per length, as the original keeps them."""
    positions = torch.arange(length)
    distances_TT = positions - positions[:, None] + length - 1
    return relative_position_buckets(num_buckets, max_distance, length)[distances_TT].to(device)


def make_plain(model: torch.nn.Module) -> None:
    """Switch a model to the plain way, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.bias_by_distance = MethodType(plain_bias, module)
            module.attend = plain_attend


def plain_loss(model: MetroPretrainingModel, batch, objective: MetroObjective) -> torch.Tensor:
    """The objective of the base configuration with everything computed everywhere."""
    original, is_masked = batch["original_ids"], batch["is_masked"]
    is_token = original.ne(model.config.pad_token_id)
    mask = is_token if batch.get("has_padding") else None
    hidden = model.auxiliary.encoder(batch["masked_ids"], mask).last_hidden_state
    weight = model.auxiliary.encoder.embed_tokens.weight
    mlm_logits = model.auxiliary.lm_head(hidden[is_masked], weight).float()
    mlm = F.cross_entropy(mlm_logits, original[is_masked], reduction="sum")
    corrupted = batch.get("corrupted_ids")
    if corrupted is None:
        samples = torch.multinomial(mlm_logits.detach().softmax(-1), 1).squeeze(-1)
        corrupted = batch["masked_ids"].masked_scatter(is_masked, samples)

    encoded = model.main.encoder(corrupted, mask).last_hidden_state
    decoded = model.main.decoder(
        batch["decoder_input_ids"], encoder_hidden_states=encoded, encoder_attention_mask=mask
    )
    log_probs = model.main.lm_head(decoded.last_hidden_state).float().log_softmax(-1).flatten(0, 1)
    log_probs.argmax(-1)  # the logged accuracies are of all positions
    masked_log_probs, targets = log_probs[is_masked.flatten()], original[is_masked].unsqueeze(-1)
    nll = -masked_log_probs.gather(-1, targets).squeeze(-1)
    rtd_logits = model.rtd_head(encoded).squeeze(-1).float()
    lm = (nll * rtd_logits[is_masked].sigmoid().detach()).sum()
    is_replaced = corrupted.ne(original).float()
    rtd = F.binary_cross_entropy_with_logits(
        rtd_logits, is_replaced, is_token.float(), reduction="sum"
    )
    return mlm + lm + objective.rtd_weight * rtd / is_token.sum() * is_masked.sum()


def plain_span_loss(model: T5PretrainingModel, batch) -> torch.Tensor:
    """The loss of span corruption by log-probabilities of the whole vocabulary."""
    encoded = model.main.encoder(batch["input_ids"], None).last_hidden_state
    decoded = model.main.decoder(batch["decoder_input_ids"], encoder_hidden_states=encoded)
    log_probs = model.main.lm_head(decoded.last_hidden_state).float().log_softmax(-1)
    log_probs.argmax(-1)  # the logged accuracy
    return -log_probs.gather(-1, batch["target_ids"].unsqueeze(-1)).sum()
