"""FLIPPED on one input: the instruction that each answer choice suggests, and the best choice.

With an instruction the winner is the choice under which it is most probable. Without one the
model's own guesses are ranked: of the instructions generated for the choices, the one most probable
under its own choice is taken as the instruction.
"""

import math
from typing import NamedTuple

import torch

from metro.data.prompts.instruction import METRO_SENTINEL, SENTINEL, encoder_text, sentinels_for
from metro.evaluation.scoring.pair_scoring import Pair, PairScorer
from metro.evaluation.scoring.rank_classification import check_distinct
from metro.evaluation.settings import FlipSettings
from metro.evaluation.tasks.protocol import choose_protocol
from metro.models.loading import load
from metro.models.placement import input_device
from metro.models.registry import find_registered
from metro.utils.characters import usable_texts
from metro.utils.messages import UserError


class ChoiceRow(NamedTuple):
    """Score and generated instruction of one answer choice."""

    choice: str
    score: float
    """log P(instruction | input, answer choice)."""
    share: float
    """exp(score) as a share of the choices' sum."""
    generated: str
    """The instruction that the model writes for the choice."""


class FlipResult(NamedTuple):
    """All answer choices in the order given, and the winner."""

    instruction: str
    """The instruction that the scores belong to."""
    rows: list[ChoiceRow]
    winner: str
    notes: list[str]
    """What was cut."""


def flip_choices(settings: FlipSettings) -> FlipResult:
    """Rank answer choices by the instruction; see the top of the module.

    Raises:
        UserError: answer choices of equal tokens, or an instruction that lacks sentinels of the
            text (it may have none).
    """
    text, choices, instruction = settings.input, settings.options, settings.instruction
    list(usable_texts([text, *choices, instruction or ""]))
    if not SENTINEL.search(text):  # as templates whose instruction follows the input
        text += "<extra_id_0>"
    if instruction is not None:
        if not SENTINEL.search(instruction):
            instruction = f"<extra_id_0> {instruction}"
        else:
            check_sentinels(text, instruction)
    model, tokenizer = load(
        settings.model,
        dtype=settings.dtype,
        vocab=settings.vocab,
        **settings.placed(settings.device),
    )
    sentinels_for(tokenizer)
    registered = find_registered(settings.model)
    protocol = choose_protocol(registered.family if registered else None, model.config, "flipped")
    encoder = protocol.encoder(tokenizer)
    sources = encoder.labelled_sources([encoder_text(text, choice) for choice in choices])
    check_distinct(sources, choices)
    scorer = PairScorer(model)
    generated = generate(model, tokenizer, sources, settings.max_new_tokens)
    if instruction is None:
        own = scorer.score([Pair(tuple(s), g) for s, g in zip(sources, generated, strict=True)])
        target = generated[own.index(max(own))]
        instruction = as_text(tokenizer, target)
    else:
        target = tuple(encoder.targets([instruction])[0])
        if len(target) < 3:
            raise UserError(
                f"nothing of the instruction {instruction!r} is left beside its sentinel; write "
                "what is asked"
            )
    scores = scorer.score([Pair(tuple(source), target) for source in sources])
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    rows = [
        ChoiceRow(choice, score, weight / sum(weights), as_text(tokenizer, ids))
        for choice, score, weight, ids in zip(choices, scores, weights, generated, strict=True)
    ]
    notes = []
    if encoder.num_cut_sources:
        notes.append(f"the input was cut at {encoder.max_source_length} tokens, losing its end")
    if encoder.num_cut_targets:
        notes.append(f"the instruction was cut at {encoder.max_target_length} tokens")
    return FlipResult(instruction, rows, choices[scores.index(best)], notes)


def check_sentinels(text: str, instruction: str) -> None:
    """Check that the instruction has the text's sentinels; others are those of untaken branches."""
    read, written = ({int(k) for k in SENTINEL.findall(each)} for each in (text, instruction))
    if not read <= written:
        names = [", ".join(f"<extra_id_{k}>" for k in sorted(each)) for each in (read, written)]
        raise UserError(
            f"--input has the sentinels {names[0]}, --instruction {names[1]}; put each where its "
            "piece of the instruction was in the input, and in front of the piece"
        )


@torch.inference_mode()
def generate(
    model, tokenizer, sources: list[list[int]], max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Generate the most probable continuation of every source, ending with the end symbol."""
    found = []
    for source in sources:
        ids = torch.tensor([source], device=input_device(model))
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )[0, 1:].tolist()
        eos = tokenizer.eos_token_id
        out = out[: out.index(eos)] if eos in out else out
        found.append((*out, eos))
    return found


def as_text(tokenizer, ids) -> str:
    """Decode generated ids without ``<s>`` and the like, sentinels written as ``<extra_id_k>``."""
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = tokenizer.decode([i for i in ids if i not in marks])
    text = METRO_SENTINEL.sub(lambda match: f"<extra_id_{int(match.group(1)) - 1}>", text)
    return text.replace("<extra_id_-1>", "<mask>")
