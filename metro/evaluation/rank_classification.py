"""Rank classification: the option with the highest log-probability is the prediction.

    direct   sum_t log P(option_t  | prompt)         Sanh et al. (2022), METRO-T0
    channel  sum_t log P(prompt_t  | option)         Min et al. (2022)
    flipped  sum_t log P(instruction_t | x, option)  Ye et al. (2023), equation 5

The sum runs over all target tokens, the end symbol included, and is not divided by their number.
What is never computed twice: the encoding of a source (all its targets are scored against it; a
channel's source "Yes" serves a whole task), the decoder's first step and its keys and values of
the source, a pair of source and target that turns up again. Pairs are batched by length within a
budget of tokens, so that the result does not depend on their order. The vocabulary's logits exist
for a chunk of rows only.

Letters: U sources, P pairs, S source tokens, T target tokens, D width, N rows of the projection.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from metro.data.instruction import encoder_text
from metro.data.prompt_encoding import PromptEncoder
from metro.evaluation.examples import EvaluationExample
from metro.finetuning.projection import projection_input
from metro.ops.linear_cross_entropy import linear_cross_entropy

METHODS = ("direct", "channel", "flipped")
NORMALIZATIONS = ("sum", "mean", "calibrated")
IGNORED = -100


class Pair(NamedTuple):
    """What one score needs: log P(target | source)."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    """With end symbol, without start symbol."""


class Batch(NamedTuple):
    """Pairs that go through the model together."""

    sources: list[tuple[int, ...]]
    pairs: list[tuple[int, tuple[int, ...]]]
    """(index into sources, target)"""


def make_batches(pairs: Sequence[Pair], batch_tokens: int) -> list[Batch]:
    """Distinct pairs in batches of similar length, the longest first.

    A batch has at most ``batch_tokens`` tokens, sources counted once per pair (their keys and
    values are repeated) and padding included; a single longer pair is a batch of its own.
    """
    targets: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for source, target in sorted(set(pairs), key=lambda pair: (-len(pair.target), pair.target)):
        targets.setdefault(source, []).append(target)
    groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
    for source, options in targets.items():  # a source with very many targets is cut
        size = max(1, batch_tokens // (len(source) + len(options[0])))
        groups += [(source, options[i : i + size]) for i in range(0, len(options), size)]
    # Target lengths in steps of 8: sources of one length stay together.
    groups.sort(key=lambda group: (-(len(group[1][0]) // 8), -len(group[0]), group))
    batches: list[Batch] = []
    longest_source = longest_target = 0
    for source, options in groups:
        longest_source = max(longest_source, len(source))
        longest_target = max(longest_target, len(options[0]))
        cost = longest_source + longest_target
        if not batches or (len(batches[-1].pairs) + len(options)) * cost > batch_tokens:
            batches.append(Batch([], []))
            longest_source, longest_target = len(source), len(options[0])
        batch = batches[-1]
        batch.pairs.extend((len(batch.sources), option) for option in options)
        batch.sources.append(source)
    return batches


def pad(rows: Sequence[Sequence[int]], value: int, device) -> torch.Tensor:
    """Rows of ids as one tensor, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


@torch.inference_mode()
def score_batch(model, batch: Batch) -> torch.Tensor:
    """Log-probabilities P (float64, on the CPU) of a batch's pairs."""
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
    if len(batch.pairs) == len(batch.sources):
        # Nothing to share behind the encoder. One row of ids serves all where they are alike.
        rows = targets[:1] if len(set(targets)) == 1 else targets
        input_ids = pad([[start, *row[:-1]] for row in rows], filler, device)
        hidden, weight, bias = projection_input(
            model,
            encoder_outputs=encoded,
            attention_mask=mask_US,
            decoder_input_ids=input_ids.expand(len(targets), -1),
        )
        loss_PT = token_losses(hidden, weight, bias, target_ids_PT)
    else:
        loss_PT = score_against_shared_sources(
            model, encoded, mask_US, owner_P, targets, target_ids_PT
        )
    return -loss_PT.sum(1, dtype=torch.float64).cpu()


def score_against_shared_sources(model, encoded, mask_US, owner_P, targets, target_ids_PT):
    """Token losses P,T where sources have several targets each.

    The first decoder step, which reads the start symbol, is run once per source and leaves the keys
    and values of the source behind; the other steps take copies of them.
    """
    num_sources, start = len(mask_US), model.config.decoder_start_token_id
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first, weight, bias = projection_input(
        model,
        encoder_outputs=encoded,
        attention_mask=mask_US,
        decoder_input_ids=mask_US.new_full((num_sources, 1), start),
        past_key_values=cache,
        use_cache=True,
    )
    first_loss = token_losses(first[owner_P], weight, bias, target_ids_PT[:, :1])
    if target_ids_PT.shape[1] == 1:
        return first_loss
    cache.batch_select_indices(owner_P)
    hidden, weight, bias = projection_input(
        model,
        encoder_outputs=BaseModelOutput(encoded[0][owner_P]),
        attention_mask=mask_US[owner_P],
        decoder_input_ids=pad(
            [target[:-1] or target for target in targets], model.config.pad_token_id, mask_US.device
        ),
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first_loss, token_losses(hidden, weight, bias, target_ids_PT[:, 1:])], 1)


def token_losses(hidden, weight, bias, target_ids_PT: torch.Tensor) -> torch.Tensor:
    """-log P of every target token, 0 where there is none; projects nothing else."""
    kept_PT = target_ids_PT != IGNORED
    loss_N = linear_cross_entropy(
        hidden[:, : target_ids_PT.shape[1]][kept_PT], weight, target_ids_PT[kept_PT], bias_V=bias
    ).loss
    return loss_N.new_zeros(target_ids_PT.shape).masked_scatter_(kept_PT, loss_N)


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
        batch_tokens: int = 8192,
        rank: int = 0,
        num_processes: int = 1,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; use at least 1")
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise ValueError(
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
        batches = make_batches(new, self.batch_tokens)
        places = {pair: number for number, pair in enumerate(new)}
        scores = torch.zeros(len(new), dtype=torch.float64)
        done, size = 0, sum(len(pair.source) + len(pair.target) for pair in new)
        for number, batch in enumerate(batches):
            if number % self.num_processes == self.rank:
                index = [places[Pair(batch.sources[owner], t)] for owner, t in batch.pairs]
                scores[index] = score_batch(self.model, batch)
            if progress is not None:
                done += sum(len(t) + len(batch.sources[owner]) for owner, t in batch.pairs)
                progress(done / size)
        if self.gather is not None:
            scores = self.gather(scores)
        self.num_computed += len(new)
        self.known.update(zip(new, scores.tolist(), strict=True))
        return [self.known[pair] for pair in pairs]


class Ranking(NamedTuple):
    """The outcome for one example."""

    scores: list[float]
    """One per option, higher is better."""
    prediction: int
    """Index of the best option; the first of equals."""


class RankClassifier:
    """Ranks the options of examples by one method.

    Args:
        scorer: scores pairs with the model.
        encoder: turns text into ids as the model's protocol wants.
        method: ``direct``, ``channel`` or ``flipped``.
        normalization: ``sum`` (published); ``mean``, the sum divided by the number of target
            tokens; ``calibrated``, the sum less that of the same option under an empty input
            (direct and flipped only).
    """

    def __init__(
        self,
        scorer: PairScorer,
        encoder: PromptEncoder,
        method: str = "direct",
        normalization: str = "sum",
    ):
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; use one of {', '.join(METHODS)}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization is {normalization!r}; use one of {', '.join(NORMALIZATIONS)}"
            )
        if normalization == "calibrated" and method == "channel":
            raise ValueError(
                "calibrated scores compare an option with and without the input; channel scores "
                "are probabilities of the input: use sum or mean"
            )
        self.scorer, self.encoder = scorer, encoder
        self.method, self.normalization = method, normalization

    def rank(self, examples: Sequence[EvaluationExample], *, progress=None) -> list[Ranking]:
        """Scores and predictions, in the order of the examples."""
        pairs, counts = self.pairs(examples)
        scores = self.scorer.score(pairs, progress=progress)
        if self.normalization == "mean":
            scores = [score / len(pair.target) for score, pair in zip(scores, pairs, strict=True)]
        elif self.normalization == "calibrated":
            empty = self.pairs([without_input(example) for example in examples])[0]
            reference = self.scorer.score(empty)
            scores = [score - other for score, other in zip(scores, reference, strict=True)]
        rankings, end = [], 0
        for count in counts:
            mine = scores[end : end + count]
            rankings.append(Ranking(mine, mine.index(max(mine))))
            end += count
        return rankings

    def pairs(self, examples: Sequence[EvaluationExample]) -> tuple[list[Pair], list[int]]:
        """The pairs of all options of all examples, and how many each example has."""
        owners = [example for example in examples for _ in example.choices]
        choices = [choice for example in examples for choice in example.choices]
        if self.method == "direct":
            sources = self.encode_once([example.input for example in owners], self.encoder.sources)
            targets = self.encode_once(choices, self.encoder.targets)
        elif self.method == "channel":
            sources = self.encode_once(choices, self.encoder.sources)
            targets = self.encode_once([example.input for example in owners], self.encoder.targets)
        else:
            sources = self.encode_once(
                [encoder_text(e.flipped_input, c) for e, c in zip(owners, choices, strict=True)],
                self.encoder.labelled_sources,
            )
            targets = self.encode_once([e.instruction for e in owners], self.encoder.targets)
        return (
            [Pair(s, t) for s, t in zip(sources, targets, strict=True)],
            [len(example.choices) for example in examples],
        )

    @staticmethod
    def encode_once(texts: Sequence[str], encode) -> list[tuple[int, ...]]:
        """``encode`` of every text, called for distinct ones."""
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, map(tuple, encode(distinct)), strict=True))
        return [ids[text] for text in texts]


def without_input(example: EvaluationExample) -> EvaluationExample:
    """The example with nothing to read, for calibration."""
    return dataclasses.replace(example, input="", flipped_input="")
