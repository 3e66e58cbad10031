"""Minimal pairs: a model that knows the language finds the better sentence of two more probable.

Warstadt et al. (2020), BLiMP. A text-to-text model has no probability of a sentence by itself: its
decoder answers a question that the encoder reads. Each kind of model is therefore asked the
question that it was pretrained on, with x the sentence in tokens:

    blanks   sum over words w of x:  log P(<s1> w <end> | x with w replaced by the sentinel <s1>)
    restore  log P(x | x) + log P(x | x'), x' the other sentence if it has as many tokens
    rtd      sum_t log P(token t of x was not replaced | x), which favours the shorter sentence

``blanks`` is for models of span corruption (T5; Hugging Face's also finetuned, METRO's not: they
begin as METRO does). It is the pseudo-log-likelihood of masked language models (Salazar et al.,
2020) with whole words hidden: hiding the pieces of a word one at a time would let the others give
it away, and rare words look likely (Kauf and Ivanova, 2023). A decoder reads the word's earlier
pieces as it goes, which is their left-to-right scoring within words, in one pass. The end sentinel
counts: else a piece could begin a longer span.

``restore`` is for denoising models (METRO, BART). METRO's decoder writes the original of a text, of
which the encoder sees a version with some tokens replaced. log P(x | x) alone mixes how probable x
is with how readily its words are copied; in the sum both sentences are judged in the light of the
same two inputs. For a denoiser with P(x | x') ~ P(x) Q(x' | x) the difference of a pair is twice
that of log P(x), if the noise Q is as likely to turn one into the other as back. Noise of this kind
keeps the number of tokens: where the sentences differ in it, the positions behind the difference
would not match and the shorter one would win, so that each is judged by itself. METRO's
pretraining decodes ``<s>`` first; finetuned models do not.

``rtd`` asks METRO's head of replaced token detection, where the checkpoint kept it: no decoder.

All three see both sides of a word, unlike a left-to-right model. Accuracies of ``blanks`` and
``restore`` are comparable as answers to "which sentence does this model prefer, asked its own
way"; log-probabilities are not, and ``restore`` shows its encoder the word in question. ``rtd`` is
what METRO trains and T5 does not: it compares METRO with METRO. A pair with equal scores counts
half, so that a model that cannot tell any two sentences apart has 50 %.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.instruction import sentinels_for
from metro.evaluation.scoring.metrics import Metrics
from metro.evaluation.scoring.pair_scoring import NotFinite, Pair, PairScorer, pad
from metro.evaluation.scoring.rank_classification import Ranking
from metro.evaluation.tasks.examples import EvaluationExample
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.models.placement import input_device

TIE_DIGITS = 6
WORD_STARTS = ("▁", "Ġ", " ")
"""First character of a word's first piece: SentencePiece, byte-level BPE, bytes."""


def question_of(model, tokenizer) -> str:
    """Return ``blanks`` or ``restore``, the question that a model was pretrained on."""
    config = model.config
    if isinstance(config, MetroT5Config):
        start = config.decoder_start_token_id
        closes_with_sentinel = model.generation_config.eos_token_id == start
        return "blanks" if closes_with_sentinel and start != config.eos_token_id else "restore"
    return "blanks" if "<extra_id_0>" in tokenizer.get_vocab() else "restore"


class PairRanker:
    """Ranks the two sentences of minimal pairs; takes the place of a ``RankClassifier``.

    Args:
        scorer: scores (source, target) pairs; of ``rtd``, sources.
        encoder: turns text into ids as the model's protocol wants.
        method: ``blanks``, ``restore`` or ``rtd``.
        model_config: of the model, for its start symbol and sentinels.
    """

    def __init__(
        self,
        scorer: "PairScorer | RtdScorer",
        encoder: PromptEncoder,
        method: str,
        model_config: PretrainedConfig,
    ):
        self.scorer, self.encoder, self.method = scorer, encoder, method
        self.config = model_config

    def rank(
        self,
        examples: Sequence[EvaluationExample],
        *,
        progress: Callable[[float], None] | None = None,
    ) -> list[Ranking]:
        """Score both sentences of all pairs; the prediction is None where they are tied."""
        asked = [self.questions(example.choices) for example in examples]
        flat = [pair for questions in asked for pairs in questions for pair in pairs]
        scores = iter(self.scorer.score(flat, progress=progress))
        rankings = []
        for questions in asked:
            mine = [sum(next(scores) for _ in pairs) for pairs in questions]
            tied = round(mine[0] - mine[1], TIE_DIGITS) == 0
            rankings.append(Ranking(mine, None if tied else mine.index(max(mine))))
        return rankings

    def questions(self, sentences: Sequence[str]) -> list[list[Pair]]:
        """Return what is asked about each sentence of a pair; its score is the sum."""
        if self.method == "blanks":
            return [self.blanks(sentence) for sentence in sentences]
        sources = [tuple(ids) for ids in self.encoder.sources(sentences)]
        if self.method == "rtd":
            return [[Pair(source, ())] for source in sources]
        is_finetuned = (
            isinstance(self.config, MetroT5Config)
            and self.config.decoder_start_token_id == self.config.eos_token_id
        )
        skipped = len(self.encoder.begin) if is_finetuned else 0
        is_replacement = len({*map(len, sources)}) == 1
        return [
            [Pair(seen, source[skipped:]) for seen in (sources if is_replacement else [source])]
            for source in sources
        ]

    def blanks(self, sentence: str) -> list[Pair]:
        """Hide one word after the other."""
        encoder, tokenizer = self.encoder, self.encoder.tokenizer
        first, second = tokenizer.convert_tokens_to_ids(sentinels_for(tokenizer)[:2])
        end = second
        if isinstance(self.config, MetroT5Config):  # its spans end with <sen000>
            end = tokenizer.convert_tokens_to_ids("<sen000>")
        ids = encoder.cut(encoder.plain([sentence])[0], num_added=1)
        bounds = [*word_starts(tokenizer.convert_ids_to_tokens(ids)), len(ids)]
        return [
            Pair(
                (*encoder.begin, *ids[:start], first, *ids[stop:], *encoder.end),
                (first, *ids[start:stop], end),
            )
            for start, stop in zip(bounds, bounds[1:], strict=False)
        ]


def word_starts(pieces: Sequence[str]) -> list[int]:
    """Return where words begin; punctuation at the end of a word is one of its own."""
    starts = [i for i, p in enumerate(pieces) if i == 0 or str(p).startswith(WORD_STARTS)]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(pieces)], strict=False):
        found.append(start)
        last = max(
            (i for i in range(start, stop) if any(map(str.isalnum, str(pieces[i])))), default=stop
        )
        if last + 1 < stop:
            found.append(last + 1)
    return found


class RtdScorer:
    """Scores sentences by the head of replaced token detection; see :class:`PairScorer`.

    Args:
        model: a METRO model.
        head: its RTD head, from encoder states to logits of "replaced".
        batch_tokens: tokens of a batch, padding included.
    """

    def __init__(self, model, head: torch.nn.Module, batch_tokens: int = 4096):
        self.model, self.batch_tokens = model, batch_tokens
        self.head = head.to(input_device(model), model.dtype).eval()

    def forget(self) -> None:
        """Nothing is remembered."""

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[Pair], *, progress: Callable[[float], None] | None = None
    ) -> list[float]:
        """Compute the log-probability that no token of each source was replaced."""
        found: dict[tuple[int, ...], float] = {}
        distinct = sorted({pair.source for pair in pairs}, key=lambda ids: (-len(ids), ids))
        device, filler = input_device(self.model), self.model.config.pad_token_id
        while len(found) < len(distinct):
            rows = distinct[len(found) :]
            rows = rows[: max(1, self.batch_tokens // len(rows[0]))]
            lengths_B = torch.tensor([len(row) for row in rows], device=device)
            mask_BS = torch.arange(len(rows[0]), device=device) < lengths_B[:, None]
            hidden_BSD = self.model.get_encoder()(pad(rows, filler, device), mask_BS)[0]
            log_p_BS = F.logsigmoid(-self.head(hidden_BSD).squeeze(-1).double())
            scores_B = log_p_BS.masked_fill(~mask_BS, 0).sum(1)
            if not bool(scores_B.isfinite().all()):
                raise NotFinite(float(scores_B.min()))
            found.update(zip(rows, scores_B.tolist(), strict=True))
            if progress is not None:
                progress(len(found) / len(distinct))
        return [found[pair.source] for pair in pairs]


def measure_pairs(predictions: Sequence[int | None]) -> Metrics:
    """Accuracy with ties (None) counting half; the first sentence of every pair is the better."""
    right = [0.5 if prediction is None else float(prediction == 0) for prediction in predictions]
    return Metrics(sum(right) / len(right), None, 0.5, 2.0)
