"""Answer texts with a sequence-to-sequence model: batched, in the order of the texts.

The protocol is that of the released model cards: the encoder reads the tokenized text with the
tokenizer's special tokens, truncated to 512 tokens; the decoder starts with the model's
``decoder_start_token_id`` and generates up to 256 tokens, greedily by default.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from metro.utils.messages import UserError

_LEAST = {
    "max_input_tokens": 3,
    "num_beams": 1,
    "num_answers": 1,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "batch_size": 1,
}
WINDOW = 16
"""Number of batches sorted by length together, to reduce padding."""
MOST_NEW_TOKENS = 256


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are searched for.

    Raises:
        ValueError: a value out of range, or one that needs another.
    """

    max_new_tokens: int | None = None
    """Longest answer; by default 256, or what the model's positions hold."""
    max_input_tokens: int = 512
    """Longer texts are cut on the right."""
    num_beams: int = 1
    num_answers: int = 1
    """Answers per text, best first: of the beams, or samples."""
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    sample: bool = False
    """Draw from the model's distribution instead of taking the best."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw from the k most probable tokens; 0 = all."""
    top_p: float = 1.0
    seed: int = 0
    """Of sampling. The same texts, batch size and seed give the same answers."""
    batch_size: int = 8
    sentinels: bool = False
    """Read ``<sen001>`` in a text as the sentinel of that name; as pretraining did, it is read as
    ordinary characters otherwise."""

    def __post_init__(self):
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; use at least {least}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; use at least 1")
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; use more than 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; use more than 0 and at most 1")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise UserError("temperature, top_k and top_p need sampling: add --sample")
        if self.num_answers > 1 and not self.sample and self.num_answers > self.num_beams:
            raise UserError(
                f"num_answers is {self.num_answers} with num_beams {self.num_beams}: use at least "
                "as many beams, or sampling"
            )

    def options(self, model) -> dict:
        """Return the arguments for ``model.generate``."""
        options: dict[str, Any] = {
            "max_new_tokens": self._longest_answer(model),
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_answers,
            "do_sample": self.sample,
        }
        if self.num_beams > 1:
            options["length_penalty"] = self.length_penalty
        if self.no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        if self.sample:
            options |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return options

    def _longest_answer(self, model) -> int:
        positions = getattr(model.config, "max_positions", None)  # T5 has no such limit
        if self.max_new_tokens is None:
            return min(MOST_NEW_TOKENS, positions) if positions else MOST_NEW_TOKENS
        if positions and self.max_new_tokens > positions:
            raise UserError(
                f"max_new_tokens is {self.max_new_tokens}, but the model has {positions} positions"
            )
        return self.max_new_tokens


class Answered(NamedTuple):
    """A text and the model's answers to it."""

    text: str
    answers: list[str]
    """Best first; ``settings.num_answers`` of them."""
    was_cut: bool
    """True if the text was longer than ``settings.max_input_tokens`` and truncated."""


def answer_texts(
    model, tokenizer, texts: Iterable[str], settings: GenerationSettings | None = None
) -> Iterator[Answered]:
    """Yield the answers to ``texts``, in their order; an empty text gets empty answers."""
    settings = settings or GenerationSettings()
    options = settings.options(model)
    longest = settings.max_input_tokens
    positions = getattr(model.config, "max_positions", None)
    longest = min(longest, positions) if positions else longest
    texts = iter(texts)
    reader = with_sentinels(tokenizer) if settings.sentinels else tokenizer
    devices = [model.device] if model.device.type == "cuda" else []
    for number in itertools.count():
        window = list(itertools.islice(texts, settings.batch_size * WINDOW))
        if not window:
            return
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash((settings.seed, number)))
            answered = _answer_window(model, reader, tokenizer, window, longest, options, settings)
        yield from answered


def with_sentinels(tokenizer):
    """Copy METRO's tokenizer, making it recognise sentinels in texts.

    Raises:
        UserError: a tokenizer without ``<sen001>``.
    """
    names = [name for name in tokenizer.get_vocab() if re.fullmatch(r"<sen\d{3,}>", name)]
    if not names:
        raise UserError(
            f"sentinels is set, but {type(tokenizer).__name__} has no <sen001>, ...; T5's "
            "<extra_id_0>, ... are always recognised (leave --sentinels out)"
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(names)
    return tokenizer


def _answer_window(model, reader, tokenizer, texts, longest, options, settings) -> list[Answered]:
    answered = [Answered(text, [""] * settings.num_answers, was_cut=False) for text in texts]
    asked = [index for index, text in enumerate(texts) if text.strip()]
    ids = {index: reader(texts[index])["input_ids"] for index in asked}
    asked.sort(key=lambda index: -len(ids[index]))
    for start in range(0, len(asked), settings.batch_size):
        batch = asked[start : start + settings.batch_size]
        inputs = reader(
            [texts[index] for index in batch],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            sequences = model.generate(
                inputs["input_ids"], attention_mask=inputs["attention_mask"], **options
            )
        decoded = tokenizer.batch_decode(
            [without_start_and_end(ids, model.generation_config) for ids in sequences.tolist()],
            skip_special_tokens=True,
        )
        for row, index in enumerate(batch):
            first = row * settings.num_answers
            answers = [text.strip() for text in decoded[first : first + settings.num_answers]]
            answered[index] = Answered(texts[index], answers, len(ids[index]) > longest)
    return answered


def without_start_and_end(ids: list[int], generation_config) -> list[int]:
    """Strip the start and end tokens, which are sentinels for models that are only pretrained."""
    ends = generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return list(itertools.takewhile(lambda index: index not in ends, ids[1:]))
