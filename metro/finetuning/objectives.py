"""Encoder input and decoder target under each objective, and the wrong label of an example.

With prompt x, answer y, and for FLIPPED the instruction I and input instance x':

==============  =======================  ==============  ====================================
objective       encoder                  decoder         trained to
==============  =======================  ==============  ====================================
``direct``      x                        y               raise P(y | x)
``channel``     y                        x               raise P(x | y)
``flipped``     x' and y                 I               raise P(I | x', y), lower it for wrong y
``direct+ul``   x                        y               raise P(y | x), lower it for wrong y
==============  =======================  ==============  ====================================

The wrong label is one of the example's other answer choices, drawn uniformly by (seed, epoch, task,
row): the same whatever the batch, the number of processes or the order of work.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

import numpy as np

from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.instruction import SENTINEL, encoder_text, has_text, model_texts
from metro.finetuning.collation import EncodedPrompt
from metro.utils.characters import bad_character_in
from metro.utils.messages import UserError


def scoring_method(objective: str) -> str:
    """Return the method that scores answer choices as the objective trains them."""
    return "direct" if objective == "direct+ul" else objective


class Unusable(UserError):
    """The example cannot be used under the objective; the message is the reason."""


def encode_example(
    example: dict, row: int, objective: str, encoder: PromptEncoder, draw: int
) -> EncodedPrompt:
    """Encode one prompted example.

    Args:
        example: as `metro prepare-prompts` writes it.
        row: its number inside its task.
        objective: one of `metro.finetuning.settings.OBJECTIVES`.
        encoder: text to ids.
        draw: seeds the choice of the wrong label.

    Raises:
        Unusable: it has no wrong label, no instruction, a character that no text has, or answer
            choices with identical ids.
    """
    if found := bad_character_in(example.values()):
        raise Unusable(f"text with {found}")
    for name in ("input", "target"):
        if not isinstance(example.get(name), str):
            raise Unusable(f"no text {name!r}: the file is damaged")
    if objective in ("direct", "channel"):
        texts = model_texts(objective, example["input"], example["target"], None, None)
        source, target = encoder.sources([texts[0]])[0], encoder.targets([texts[1]])[0]
        return EncodedPrompt(row, _ids(source), _ids(target))
    gold, others = gold_and_others(example)
    random.Random(draw).shuffle(others)
    if objective == "flipped":
        return _flipped(example, row, encoder, gold, others)
    return _direct_unlikelihood(example, row, encoder, others)


def _flipped(
    example: dict, row: int, encoder: PromptEncoder, gold: str, others: list[str]
) -> EncodedPrompt:
    text, instance = example.get("instruction"), example.get("flipped_input")
    if not text or instance is None:
        raise Unusable("no instruction")
    if not has_text(text):
        raise Unusable("instruction without text")
    instruction = encoder.targets([text])[0]
    if len(instruction) == encoder.max_target_length:  # it may have been cut
        sentinels = encoder.plain([match.group() for match in SENTINEL.finditer(text)])
        if set(instruction[:-1]) <= set(chain.from_iterable(sentinels)):
            raise Unusable("instruction cut to nothing but sentinels")
    right = encoder.labelled_sources([encoder_text(instance, gold)])[0]
    for label in others:
        wrong = encoder.labelled_sources([encoder_text(instance, label)])[0]
        if wrong != right:
            ids = _ids(right), _ids(instruction)
            return EncodedPrompt(row, *ids, wrong_source_ids=_ids(wrong))
    raise Unusable("identical ids of all answer choices")


def _direct_unlikelihood(
    example: dict, row: int, encoder: PromptEncoder, others: list[str]
) -> EncodedPrompt:
    source, target = encoder.sources([example["input"]])[0], encoder.targets([example["target"]])[0]
    for label in others:
        wrong = encoder.targets([label])[0]
        if wrong != target:
            ids = _ids(source), _ids(target)
            return EncodedPrompt(row, *ids, wrong_target_ids=_ids(wrong))
    raise Unusable("identical ids of all answer choices")


def _ids(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def gold_and_others(example: dict) -> tuple[str, list[str]]:
    """Return the right answer choice, and the distinct texts among the others.

    Raises:
        Unusable: there is no right answer choice, or no other one.
    """
    choices, label = example.get("answer_choices"), example.get("label")
    if not choices or label is None:
        raise Unusable("no answer choices")
    gold = choices[label]
    others = [text for text in dict.fromkeys(choices) if text != gold]
    if not others:
        raise Unusable("a single answer choice")
    return gold, others
