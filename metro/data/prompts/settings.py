"""What is to be prepared: the options of `metro prepare-prompts`, checked and put together."""

import hashlib
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

from metro.data.datasets import name_of
from metro.data.prompts.examples import RenderingSettings
from metro.data.prompts.instruction import INSTRUCTION_TEXTS
from metro.data.prompts.mixtures import Mixture, find_mixture
from metro.data.prompts.sources import PlannedRow, PromptSources, Unavailable, estimate
from metro.data.prompts.templates import TemplateTree, find_templates
from metro.modeling.text_metro_t5 import Vocabulary
from metro.utils.messages import UserError

FORMAT_VERSION = 1
FORMATS = ("fairseq", "jsonl")


class PromptSettings(NamedTuple):
    """Everything that decides what is prepared; see ``prepare_prompts``."""

    mixture: Mixture
    sources: PromptSources
    format: str
    vocabulary: Vocabulary | None
    rendering: RenderingSettings
    lower: bool

    def fingerprint(self) -> dict:
        """What an interrupted run and its continuation must have in common."""
        vocabulary = None
        if self.vocabulary:
            vocabulary = _digest(list(self.vocabulary.checksums().values()))
        sources = self.sources
        return {
            "version": FORMAT_VERSION,
            "format": self.format,
            "mixture": self.mixture.name,
            "data_sets": [name_of(*names) for names in self.mixture.data_sets],
            "rules": _rules(self.mixture),
            "templates": _digest([[plan.key, plan.templates] for plan in sources.plans()]),
            "source": sources.source,
            "data_dir": str(sources.data_dir.resolve()) if sources.data_dir else None,
            "data_files": _digest(sources.local_files()),
            "validation": sources.validation,
            "limits": sources.limits,
            "seed": self.rendering.seed,
            "instruction_text": self.rendering.instruction_text,
            "vocab": vocabulary,
            "lower": self.lower,
        }


def read_settings(
    mixture: str,
    *,
    vocab: str | Path | None = None,
    format: str | None = None,
    templates: str | Path | TemplateTree | None = None,
    data_dir: str | Path | None = None,
    data_sets: list[str] | None = None,
    source: str = "templates",
    validation: str = "published",
    limit: int | None = None,
    valid_limit: int | None = None,
    seed: int = 0,
    instruction_text: str = "published",
    lower: bool = True,
) -> PromptSettings:
    """Check the options of ``prepare_prompts`` and find what they name.

    Raises:
        ValueError: an option has no such value.
    """
    found = find_mixture(mixture).narrowed(data_sets)
    is_flipped = found.cap_of == "data_set"
    format = format or ("fairseq" if vocab and not is_flipped else "jsonl")
    if format not in FORMATS:
        raise UserError(f"--format is {format!r}, and must be one of {', '.join(FORMATS)}")
    if format == "fairseq" and is_flipped:
        raise UserError(
            f"mixture {found.name} needs the answer choices of each example, which fairseq's "
            "format cannot hold: leave --format out (both training routes read jsonl for it)"
        )
    if format == "fairseq" and not vocab:
        raise UserError("--format fairseq needs a vocabulary: add --vocab DIR")
    if instruction_text not in INSTRUCTION_TEXTS:
        raise UserError(
            f"--instruction-text is {instruction_text!r}, and must be one of "
            f"{', '.join(INSTRUCTION_TEXTS)}"
        )
    sources = PromptSources(
        found,
        templates if isinstance(templates, TemplateTree) else find_templates(templates),
        source=source,
        data_dir=Path(data_dir) if data_dir is not None else None,
        validation=validation,
        limit=limit,
        valid_limit=valid_limit,
    )
    can_flip = format == "jsonl" and source == "templates"
    rendering = RenderingSettings(
        seed, found.fold_whitespace, found.needs_choices, instruction_text, can_flip
    )
    vocabulary = Vocabulary.from_folder(vocab) if vocab else None
    return PromptSettings(found, sources, format, vocabulary, rendering, lower)


def ignored_options(settings: PromptSettings) -> list[str]:
    """What was asked for and changes nothing, worded for people."""
    notes, vocabulary = [], settings.vocabulary
    if settings.format == "jsonl":
        if not settings.lower:
            notes.append("--cased changes nothing: jsonl keeps the text as it is")
        if vocabulary:
            notes.append(f"--vocab {vocabulary.folder} is not used: jsonl holds text")
    else:
        if not settings.lower and not vocabulary.is_cased:
            notes.append(f"{vocabulary.folder} has no capitals, so --cased has little effect")
        if settings.rendering.instruction_text != "published":
            notes.append("--instruction-text changes nothing: fairseq's format has no instructions")
    return notes


def plan_prompts(settings: PromptSettings) -> list[PlannedRow | Unavailable]:
    """What ``prepare_prompts`` would do, with sizes; tokens are estimated from a few rows."""
    if settings.vocabulary is None:
        return list(estimate(settings.sources, settings.rendering, lambda text: len(text.split())))
    encode = settings.vocabulary.encode
    return list(
        estimate(
            settings.sources, settings.rendering, lambda text: len(encode(text, settings.lower))
        )
    )


def _rules(mixture: Mixture) -> str:
    """Which templates a mixture takes, as a checksum: a changed rule is another mixture."""
    values = astuple(mixture)
    return _digest([sorted(value) if isinstance(value, frozenset) else value for value in values])


def _digest(facts: list) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
