"""Protocols of the model families: special tokens, lengths, white space.

==========  ==========================  ===========================  ==============================
family      source                      lengths (source, target)     from
==========  ==========================  ===========================  ==============================
metro       ``<s> text </s>``           512, 256                     METRO-T0's evaluation
t0          ``text``, no end symbol     512, 256                     T0's evaluation, see below
flipped     ``text </s>``               512, 64 (some tasks others)  FLIPPED's evaluation
t5          ``text </s>``               512, 256                     METRO, for any other model
==========  ==========================  ===========================  ==============================

T0's own script reads sources of up to 1024 tokens. On T0 Eval that is the same: its longest prompt
has some 340. Targets always end with the end symbol, which counts. Lengths are never longer than
the model's position table. With method channel the target is the prompt, which may be as long as a
source. White space is folded to single blanks for the families whose tokenizers do so anyway; the
text of instructions is left alone.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from metro.data.prompts.encoding import MAX_SOURCE_LENGTH, PromptEncoder
from metro.evaluation.tasks.examples import EvaluationExample


@dataclass(frozen=True)
class Protocol:
    """Evaluation protocol of a family of models, see the top of the module."""

    family: str
    source_special_tokens: bool = True
    max_source_length: int = MAX_SOURCE_LENGTH
    max_target_length: int = 256
    truncation_side: str = "right"
    fold_whitespace: bool = True
    task_lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Task -> (source, target), where a task has its own lengths."""

    def lengths(self, task: str) -> tuple[int, int]:
        """Return the longest source and target of a task."""
        return self.task_lengths.get(task, (self.max_source_length, self.max_target_length))

    def encoder(self, tokenizer, task: str = "") -> PromptEncoder:
        """Make the encoder of a task's texts."""
        source, target = self.lengths(task)
        return PromptEncoder(
            tokenizer,
            source_special_tokens=self.source_special_tokens,
            max_source_length=source,
            max_target_length=target,
            truncation_side=self.truncation_side,
        )

    def prepare(self, example: EvaluationExample) -> EvaluationExample:
        """Fold the white space of an example as the family reads it."""
        if not self.fold_whitespace:
            return example
        folded = [" ".join(choice.split()) for choice in example.choices]
        return replace(example, input=" ".join(example.input.split()), choices=folded)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """Describe the protocol in one line."""
        special = "with" if self.source_special_tokens else "without"
        parts = [
            f"{self.family}: sources {special} special tokens, at most {self.max_source_length} "
            f"tokens, targets {self.max_target_length} with end symbol"
        ]
        parts += [f"{task} {s} and {t}" for task, (s, t) in self.task_lengths.items()]
        if self.truncation_side == "left":
            parts.append("longer sources lose their beginning")
        if self.family == "t0" and self.max_source_length < T0_SOURCE_LENGTH:
            parts.append(
                f"T0's own script reads {T0_SOURCE_LENGTH}: --max-source-length {T0_SOURCE_LENGTH}"
            )
        return "; ".join(parts)


T0_SOURCE_LENGTH = 1024
PROTOCOLS = {
    "metro": Protocol("metro"),
    "t0": Protocol("t0", source_special_tokens=False),
    "flipped": Protocol(
        "flipped",
        max_target_length=64,
        fold_whitespace=False,
        task_lengths={
            "hellaswag": (256, 64),
            "story_cloze": (256, 128),
            "arc_challenge": (256, 64),
            "winogrande": (512, 128),
            "wsc": (512, 128),
        },
    ),
    "t5": Protocol("t5", fold_whitespace=False),
}


def choose_protocol(
    family: str | None,
    model_config,
    method: str,
    *,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    truncation_side: str = "right",
) -> Protocol:
    """Choose the protocol of a model.

    Args:
        family: one of PROTOCOLS; None: by the type of model.
        model_config: the model's configuration: its type, and the longest sequence it reads.
        method: ``direct``, ``channel`` or ``flipped``.
        max_source_length, max_target_length: instead of the family's, for all tasks; one of them
            leaves the other as it is, but for channel's targets.
        truncation_side: see :class:`PromptEncoder`; all published ones cut on the right.
    """
    model_type = getattr(model_config, "model_type", "")
    if family is None:
        family = "metro" if model_type in ("metro_t5", "fairseq_t5") else "t5"
    protocol = PROTOCOLS[family]

    def given_or(source: int, target: int) -> tuple[int, int]:
        return (
            source if max_source_length is None else max_source_length,
            target if max_target_length is None else max_target_length,
        )

    source, target = given_or(protocol.max_source_length, protocol.max_target_length)
    task_lengths = {task: given_or(*lengths) for task, lengths in protocol.task_lengths.items()}
    if method == "channel":
        target, task_lengths = given_or(source, source)[1], {}
    protocol = replace(
        protocol,
        max_source_length=source,
        max_target_length=target,
        truncation_side=truncation_side,
        task_lengths={t: both for t, both in task_lengths.items() if both != (source, target)},
    )
    from metro.models.projection import position_limits  # and torch with it

    limits = position_limits(model_config)
    source, target = limits.lengths(source, target)
    return replace(
        protocol,
        max_source_length=source,
        max_target_length=target,
        task_lengths={task: limits.lengths(*both) for task, both in protocol.task_lengths.items()},
    )
