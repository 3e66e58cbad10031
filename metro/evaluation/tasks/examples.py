"""One question of an evaluation, ready to be scored by any method."""

from collections.abc import Sequence
from dataclasses import dataclass

from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.examples import PromptedExample
from metro.utils.characters import bad_character_in
from metro.utils.messages import UserError


@dataclass(frozen=True, slots=True)
class EvaluationExample:
    """Prompt, answer choices and truth of one row, all rendered with the same draw."""

    index: int
    """Number of the row in its split; prompts of a task are compared by it."""
    input: str
    """The rendered prompt."""
    choices: Sequence[str]
    label: int | None
    """Index of the true choice, the first one where choices are identical; None if unknown."""
    flipped_input: str | None = None
    """The input instance with sentinels, where the method needs it."""
    instruction: str | None = None

    @classmethod
    def of(cls, example: PromptedExample) -> "EvaluationExample":
        """The question that a prompted example with answer choices asks."""
        return cls(
            example["row"],
            example["input"],
            example["answer_choices"] or (),
            example["label"],
            example["flipped_input"],
            example["instruction"],
        )

    def __post_init__(self):
        texts = (self.input, self.choices, self.flipped_input, self.instruction)
        if found := bad_character_in(texts):
            raise UnusableRow(f"text with {found}", f"prompt {self.input!r}")
        if not self.choices:
            raise UserError(f"row {self.index} has no answer choices")
        for number, choice in enumerate(self.choices):
            if not choice.strip():
                raise UserError(f"answer choice {number} of row {self.index} is empty")
        if self.label is not None and not 0 <= self.label < len(self.choices):
            raise UserError(
                f"label {self.label} of row {self.index} is not one of its {len(self.choices)} "
                "choices"
            )

    @property
    def num_distinct_choices(self) -> int:
        return len(set(self.choices))
