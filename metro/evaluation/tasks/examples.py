"""One question of an evaluation, ready to be scored by any method."""

from collections.abc import Sequence
from dataclasses import dataclass

from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.examples import PromptedExample, check_choices
from metro.utils.characters import bad_character_in


@dataclass(frozen=True, slots=True)
class EvaluationExample:
    """Prompt, answer choices and truth of one row, all rendered with the same draw.

    Raises:
        UnusableRow: the row asks for no choice, or has a character that no text has.
    """

    index: int
    """Number of the row in its split; prompts of a task are compared by it."""
    input: str
    """The rendered prompt."""
    choices: Sequence[str]
    label: int
    """Index of the true choice."""
    flipped_input: str | None = None
    """The input instance with sentinels, where the method needs it."""
    instruction: str | None = None
    is_cut: bool = False
    """A value of the row was cut."""

    @classmethod
    def of(cls, example: PromptedExample) -> "EvaluationExample":
        """The question that a prompted example asks.

        Raises:
            UnusableRow: it asks for no choice.
        """
        choices = example["answer_choices"] or ()
        return cls(
            example["row"],
            example["input"],
            choices,
            check_choices(choices, example["label"], example["target"]),
            example["flipped_input"],
            example["instruction"],
            example.get("cut", False),
        )

    def __post_init__(self):
        texts = (self.input, self.choices, self.flipped_input, self.instruction)
        if found := bad_character_in(texts):
            raise UnusableRow(f"text with {found}", f"prompt {self.input!r}")
        check_choices(self.choices, self.label)

    @property
    def num_distinct_choices(self) -> int:
        return len(set(self.choices))
