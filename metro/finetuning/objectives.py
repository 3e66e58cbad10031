"""What encoder and decoder read under each objective, and which wrong label an example gets.

With prompt x, answer y, and for FLIPPED the instruction I and input instance x':

==============  =======================  ==============  ====================================
objective       encoder                  decoder         trained to
==============  =======================  ==============  ====================================
``direct``      x                        y               raise P(y | x)
``channel``     y                        x               raise P(x | y)
``flipped``     x' and y                 I               raise P(I | x', y), lower it for wrong y
``direct+ul``   x                        y               raise P(y | x), lower it for wrong y
==============  =======================  ==============  ====================================

The wrong label is one of the example's other options, drawn uniformly by (seed, epoch, task, row):
the same whatever the batch, the number of processes or the order of work.
"""

from __future__ import annotations

import random
import zlib
from itertools import chain

import numpy as np

from metro.data.prompts.encoding import PromptEncoder
from metro.data.prompts.instruction import SENTINEL, encoder_text
from metro.finetuning.collation import EncodedPrompt
from metro.utils.messages import UserError

OBJECTIVES = ("direct", "channel", "flipped", "direct+ul")
NEEDS_WRONG_LABEL = ("flipped", "direct+ul")


class Unusable(UserError):
    """This example cannot be used under the objective; the message is the reason."""


def check_objective(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise UserError(f"objective is {objective!r}; use one of {', '.join(OBJECTIVES)}")


def encode_example(
    example: dict, index: int, objective: str, encoder: PromptEncoder, draw: int
) -> EncodedPrompt:
    """One prompted example as the model reads it.

    Args:
        example: as `metro prepare-prompts` writes it.
        index: its number inside its task.
        objective: one of OBJECTIVES.
        encoder: text to ids.
        draw: seeds the choice of the wrong label.

    Raises:
        Unusable: it has no wrong label, no instruction, or options that encode alike.
    """
    if objective == "direct":
        source, target = encoder.sources([example["input"]]), encoder.targets([example["target"]])
        return _encoded(index, source[0], target[0])
    if objective == "channel":
        source, target = encoder.sources([example["target"]]), encoder.targets([example["input"]])
        return _encoded(index, source[0], target[0])
    gold, others = gold_and_others(example)
    random.Random(draw).shuffle(others)
    if objective == "flipped":
        if not (example.get("flipped_input") is not None and example.get("instruction")):
            raise Unusable("no instruction")
        return _flipped(example, index, encoder, gold, others)
    return _direct_unlikelihood(example, index, encoder, others)


def _flipped(example, index, encoder, gold, others) -> EncodedPrompt:
    text = example["instruction"]
    if not SENTINEL.sub("", text).strip():
        raise Unusable("instruction without text")
    instruction = encoder.targets([text])[0]
    if len(instruction) == encoder.max_target_length:  # it may have been cut
        sentinels = encoder.plain([match.group() for match in SENTINEL.finditer(text)])
        if set(instruction[:-1]) <= set(chain.from_iterable(sentinels)):
            raise Unusable("instruction cut to nothing but sentinels")
    right = encoder.labelled_sources([encoder_text(example["flipped_input"], gold)])[0]
    for label in others:
        wrong = encoder.labelled_sources([encoder_text(example["flipped_input"], label)])[0]
        if wrong != right:
            return _encoded(index, right, instruction, wrong)
    raise Unusable("options that encode alike")


def _direct_unlikelihood(example, index, encoder, others) -> EncodedPrompt:
    source, target = encoder.sources([example["input"]])[0], encoder.targets([example["target"]])[0]
    for label in others:
        wrong = encoder.targets([label])[0]
        if wrong != target:
            return _encoded(index, source, target, wrong)
    raise Unusable("options that encode alike")


def _encoded(index: int, source, target, wrong=None) -> EncodedPrompt:
    def ids(values):
        return None if values is None else np.array(values, dtype=np.int64)

    return EncodedPrompt(index, ids(source), ids(target), ids(wrong))


def gold_and_others(example: dict) -> tuple[str, list[str]]:
    """The right option and the different texts among the others.

    Raises:
        Unusable: there is no right option among them, or no other one.
    """
    options, label = example.get("answer_choices"), example.get("label")
    if not options or label is None:
        raise Unusable("no options")
    gold = options[label]
    others = [text for text in dict.fromkeys(options) if text != gold]
    if not others:
        raise Unusable("a single option")
    return gold, others


def stable_hash(text: str) -> int:
    """The same number for a text in every process."""
    return zlib.crc32(text.encode("utf-8"))
