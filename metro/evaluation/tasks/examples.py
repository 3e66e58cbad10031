"""One question of an evaluation, ready to be scored by any method."""

from collections.abc import Sequence
from dataclasses import dataclass

from metro.utils.messages import UserError


@dataclass(frozen=True, slots=True)
class EvaluationExample:
    """Prompt, options and truth of one row, all rendered with the same draw."""

    index: int
    """Row of the dataset's split; prompts of a task are compared by it."""
    input: str
    """The rendered prompt."""
    choices: Sequence[str]
    label: int | None
    """Index of the true option, the first one where options are alike; None if unknown."""
    flipped_input: str | None = None
    """The input instance with sentinels, where the method needs it."""
    instruction: str | None = None

    def __post_init__(self):
        if not self.choices:
            raise UserError(f"row {self.index} has no answer choices")
        for number, choice in enumerate(self.choices):
            if not choice.strip():
                raise UserError(f"answer choice {number} of row {self.index} is empty")
        if self.label is not None and not 0 <= self.label < len(self.choices):
            raise UserError(
                f"label {self.label} of row {self.index} is none of its {len(self.choices)} choices"
            )

    @property
    def num_distinct_choices(self) -> int:
        return len(set(self.choices))
