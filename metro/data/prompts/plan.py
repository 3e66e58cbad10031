"""The plan of `metro prepare-prompts`: what its options name, and the sizes of a dry run."""

import hashlib
from dataclasses import astuple
from typing import NamedTuple

from metro.data.datasets import name_of
from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.examples import ExampleSettings, make_example
from metro.data.prompts.mixtures import Mixture, find_mixture
from metro.data.prompts.sources import PartPlan, PromptSources, Unavailable
from metro.data.prompts.templates import find_templates
from metro.data.settings import PreparePromptsSettings
from metro.data.text.vocabulary import read_vocabulary
from metro.modeling.text_metro_t5 import Vocabulary
from metro.utils.messages import UserError, shortened

PROMPTS_FORMAT_VERSION = 3
"""Counted up when equal settings give other examples."""


class PromptPlan(NamedTuple):
    """Everything that decides which examples are prepared; see ``prepare_prompts``."""

    mixture: Mixture
    sources: PromptSources
    format: str
    vocabulary: Vocabulary | None
    rendering: ExampleSettings
    lower: bool

    def fingerprint(self) -> dict:
        """Return the facts that an interrupted run and its continuation must share."""
        vocabulary = None
        if self.vocabulary:
            vocabulary = _digest(list(self.vocabulary.checksums().values()))
        sources = self.sources
        rules = [sorted(x) if isinstance(x, frozenset) else x for x in astuple(self.mixture)]
        return {
            "version": PROMPTS_FORMAT_VERSION,
            "format": self.format,
            "mixture": self.mixture.name,
            "datasets": [name_of(*names) for names in self.mixture.datasets],
            "rules": _digest(rules),
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


def make_plan(options: PreparePromptsSettings) -> PromptPlan:
    """Find the mixture, templates, rows and vocabulary that the options name.

    Raises:
        UserError: one of them does not exist, or they do not fit together.
    """
    found = find_mixture(options.mixture).narrowed(options.datasets)
    is_flipped = found.cap_of == "dataset"
    format = options.format or ("fairseq" if options.vocab and not is_flipped else "jsonl")
    if format == "fairseq" and is_flipped:
        raise UserError(
            f"mixture {found.name} needs the answer choices of each example, which fairseq's "
            "format cannot hold: leave format out (both training routes read jsonl for it)"
        )
    if format == "fairseq" and not options.vocab:
        raise UserError("format fairseq needs a vocabulary: add vocab (--vocab DIR)")
    sources = PromptSources(found, find_templates(options.templates), options)
    rendering = ExampleSettings(
        options.seed,
        options.instruction_text,
        found.fold_whitespace,
        needs_choices=found.needs_choices,
        with_instruction=format == "jsonl" and options.source == "templates",
    )
    vocabulary = read_vocabulary(options.vocab) if options.vocab else None
    return PromptPlan(found, sources, format, vocabulary, rendering, not options.cased)


def ignored_options(plan: PromptPlan) -> list[str]:
    """Word a warning for every option that was given and has no effect, and for unread files."""
    notes, vocabulary = [], plan.vocabulary
    if strays := plan.sources.stray_files():
        notes.append(f"not read, as no split is called so: {shortened(strays)}")
    if plan.format == "jsonl":
        if not plan.lower:
            notes.append("--cased changes nothing: jsonl keeps the text as it is")
        if vocabulary:
            notes.append(f"--vocab {vocabulary.folder} is not used: jsonl holds text")
    elif vocabulary:
        if not plan.lower and not vocabulary.is_cased:
            notes.append(f"{vocabulary.folder} has no capitals, so --cased has little effect")
        if plan.rendering.instruction_text != "published":
            notes.append("--instruction-text changes nothing: fairseq's format has no instructions")
    return notes


class PlannedRow(NamedTuple):
    """One line of the plan that `--dry-run` prints."""

    side: str
    dataset: str
    templates: int
    rows: int
    examples: int
    cap: int
    per_epoch: int
    """Examples that an epoch reads."""
    tokens: int
    """Of an epoch, source and target, estimated from a few rows (words, where no vocabulary)."""


def planned_sizes(plan: PromptPlan) -> list[PlannedRow | Unavailable]:
    """Plan ``prepare_prompts`` with sizes: rows are counted, tokens measured on a few of them."""

    def count_tokens(text: str) -> int:
        vocabulary = plan.vocabulary
        return len(vocabulary.encode(text, plan.lower) if vocabulary else text.split())

    sources = plan.sources
    lines: list[PlannedRow | Unavailable] = [*sources.without_templates()]
    for part_plan in sources.plans():
        try:
            part, num_rows = sources.sample(part_plan)
        except UserError as error:
            lines.append(Unavailable(part_plan.side, part_plan.name, str(error)))
            continue
        tried, lengths = 0, []
        for _, split, index, row in part.rows(0, part.num_rows):
            for template in part_plan.templates:
                tried += 1
                if isinstance(row, UnusableRow):
                    continue
                try:
                    example = make_example(template, row, split, index, plan.rendering)
                except UnusableRow:
                    continue
                lengths.append(count_tokens(example["input"]) + count_tokens(example["target"]))
        num_templates = len(part_plan.templates)
        examples = round(num_rows * num_templates * len(lengths) / max(1, tried))
        capped = min(examples, _per_epoch(plan.mixture, part_plan, num_rows))
        tokens = round(capped * sum(lengths) / max(1, len(lengths)))
        sizes = (num_templates, num_rows, examples, part_plan.cap, capped, tokens)
        lines.append(PlannedRow(part_plan.side, part_plan.name, *sizes))
    return lines


def _per_epoch(mixture: Mixture, plan: PartPlan, num_rows: int) -> int:
    """Return the examples of a part in an epoch, if no row is left out."""
    if plan.side == "valid":
        return num_rows * len(plan.templates)
    if mixture.cap_of == "dataset":
        return min(plan.cap, num_rows)
    return min(plan.cap, num_rows) * len(plan.templates)


def _digest(facts: list) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
