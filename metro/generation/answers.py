"""Answer texts with a sequence-to-sequence model: batched, in the order of the texts.

The protocol is that of the released model cards: the encoder reads the tokenized text with the
tokenizer's special tokens, truncated to 512 tokens; the decoder starts with the model's
``decoder_start_token_id`` and generates up to 256 tokens, greedily by default.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from metro.generation.settings import GenerationSettings
from metro.models.loading import LoadedModel, load
from metro.models.placement import input_device
from metro.models.projection import position_limits
from metro.utils.characters import usable_texts
from metro.utils.messages import UserError
from metro.utils.progress import Progress

WINDOW = 16
"""Number of batches sorted by length together, to reduce padding."""


class Answered(NamedTuple):
    """A text and the model's answers to it."""

    text: str
    answers: list[str]
    """Best first; ``settings.num_answers`` of them."""
    was_cut: bool
    """True if the text was longer than ``settings.max_input_tokens`` and truncated."""


def generate(
    model: str | Path | LoadedModel,
    texts: str | Iterable[str],
    settings: GenerationSettings | None = None,
    *,
    progress: bool | Progress = True,
    **options: Any,
) -> list[str] | list[list[str]]:
    """Answer texts with a model.

    Args:
        model: registered name, hub id, Hugging Face folder, fairseq checkpoint (``.pt``), or a
            model loaded before with `metro.load`, which is not loaded for each call.
        texts: one text or several.
        settings: all options, or give them one by one.
        progress: show progress on stderr.
        options: fields of `GenerationSettings`, such as ``max_new_tokens`` or ``num_beams``.

    Returns:
        An answer per text; with ``num_answers`` above 1 a list of answers per text, best first.

    Raises:
        UserError: an option is wrong, or there is no such model.
    """
    settings = GenerationSettings.of(settings, **options)
    if isinstance(model, LoadedModel):
        for name in ("device", "dtype", "vocab", "device_map", "load_in"):
            if (value := getattr(settings, name)) is not None:
                raise UserError(
                    f"{name} is {str(value)!r}, but the model is loaded already: give it to "
                    "metro.load instead"
                )
    texts = [texts] if isinstance(texts, str) else list(texts)
    found = []
    with Progress.of(progress) as shown:
        if not isinstance(model, LoadedModel):
            shown.say(f"loading {model}")
            model = load_for_generation(model, settings)
        for answered in answer_texts(*model, texts, settings):
            found.append(answered)
            shown.show("generating", len(found), len(texts))
        if num_cut := sum(answered.was_cut for answered in found):
            shown.say(remark_on_cut(num_cut, model.model, settings))
    if settings.num_answers > 1:
        return [answered.answers for answered in found]
    return [answered.answers[0] for answered in found]


def load_for_generation(name: str | Path, settings: GenerationSettings) -> LoadedModel:
    """Load a model where and as the settings say; by default on a GPU, in its fast type there.

    Raises:
        UserError: the device is not available, or there is no such model.
    """
    device, dtype = settings.device, settings.dtype
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}); try cpu") from None
    if dtype is None:
        dtype = "fast" if torch.device(device).type == "cuda" else "float32"
    return load(name, dtype=dtype, vocab=settings.vocab, **settings.placed(device))


def remark_on_cut(num_cut: int, model, settings: GenerationSettings) -> str:
    """Say that texts were longer than the settings or the model allow."""
    positions = position_limits(model.config).encoder
    limit = f"max_input_tokens is {settings.max_input_tokens}"
    if positions and positions < settings.max_input_tokens:
        limit += f", and the model has {positions} positions"
    return f"note: {num_cut} of the texts were cut: {limit}"


def answer_texts(
    model, tokenizer, texts: Iterable[str], settings: GenerationSettings | None = None
) -> Iterator[Answered]:
    """Yield the answers to ``texts``, in their order; an empty text gets empty answers.

    Raises:
        UserError: a text has a character that no text has, see `metro.utils.characters`.
    """
    settings = settings or GenerationSettings()
    options = settings.options(model)
    longest = settings.max_input_tokens
    positions = position_limits(model.config).encoder
    longest = min(longest, positions) if positions else longest
    texts = usable_texts(texts)
    reader = with_sentinels(tokenizer) if settings.sentinels else tokenizer
    device = input_device(model)
    devices = [device] if device.type == "cuda" else []
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
            "<extra_id_0>, ... are always recognised (leave sentinels out)"
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(names)
    return tokenizer


class RefuseNaN(LogitsProcessor):
    """Ends generation where the model's scores are NaN, of which any token could be made.

    Args:
        texts: of the batch; each has the same number of rows.
    """

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor):
        if bool((bad := scores.isnan().any(-1)).any()):
            row = int(bad.nonzero()[0]) * len(self.texts) // len(scores)
            raise UserError(
                f"the model's scores for the text {self.texts[row][:60]!r} are NaN: its weights or "
                "activations are not finite; use another dtype (bfloat16 or float32 instead of "
                "float16), or another checkpoint"
            )
        return scores


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
        ).to(input_device(model))
        refuse = LogitsProcessorList([RefuseNaN([texts[index] for index in batch])])
        with torch.inference_mode():
            sequences = model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                logits_processor=refuse,
                **options,
            )
        # Not skip_special_tokens, which drops METRO's sentinels: what a pretrained model fills in.
        special = set(tokenizer.all_special_ids)
        decoded = tokenizer.batch_decode(
            [
                [index for index in without_start_and_end(ids, model.generation_config)
                 if index not in special]
                for ids in sequences.tolist()
            ]
        )  # fmt: skip
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
