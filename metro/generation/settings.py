"""Settings of `metro generate` and `metro.generate`. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro.models.placement import PlacementSettings
from metro.utils.messages import UserError
from metro.utils.settings import PRECISION_FLAGS, option

MOST_NEW_TOKENS = 256


@dataclass(kw_only=True)
class GenerationSettings(PlacementSettings):
    """Options of generation; the defaults are those of the released cards."""

    max_new_tokens: int | None = option(
        None, "Longest answer; default: 256, or the model's positions.", least=1
    )
    num_beams: int = option(1, "Beam search; 1 is greedy.", least=1)
    num_answers: int = option(1, "Answers per text, best first: of beams or samples.", least=1)
    length_penalty: float = option(1.0, "Of beams; more favours longer.", section="Search")
    no_repeat_ngram_size: int = option(0, "Never repeat so many tokens.", least=0)
    sample: bool = option(
        False, "Draw from the model's distribution instead of the best.", section="Sampling"
    )
    temperature: float = option(1.0, "Of --sample.")
    top_k: int = option(0, "Of --sample: the k most probable tokens; 0 is all.", least=0)
    top_p: float = option(1.0, "Of --sample: tokens of this much probability.")
    seed: int = option(0, "Of --sample; the same texts, batch size and seed give the same answers.")
    batch_size: int = option(8, "Texts at once.", least=1, section="Model and device")
    max_input_tokens: int = option(512, "Longer texts are truncated.", least=3)
    sentinels: bool = option(False, "Read <sen001> in a text as that sentinel, not as text.")
    dtype: str | None = option(
        None,
        "Of weights and products: fp32, bf16, fp16, auto (as saved), fast (bf16 or fp32); default: "
        "fp32, fast on a GPU.",
        flag=PRECISION_FLAGS,
    )
    vocab: Path | None = option(None, "Folder with sp.model and dict.txt, for a checkpoint .pt.")

    def check(self) -> None:
        """Refuse values out of range, and ones that need another."""
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; use more than 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; use more than 0 and at most 1")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise UserError("temperature, top_k and top_p need sampling: add sample")
        if self.num_answers > 1 and not self.sample and self.num_answers > self.num_beams:
            raise UserError(
                f"num_answers is {self.num_answers} with num_beams {self.num_beams}: use at least "
                "as many beams, or sampling"
            )

    def options(self, model: Any) -> dict[str, Any]:
        """Arguments for ``model.generate``.

        Raises:
            UserError: ``max_new_tokens`` is more than the model's positions.
        """
        options: dict[str, Any] = {
            "max_new_tokens": self._longest_answer(model),
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_answers,
            "do_sample": self.sample,
        }
        if self.num_beams > 1:
            options["length_penalty"] = self.length_penalty
        if self.no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        if self.sample:
            options |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return options

    def _longest_answer(self, model: Any) -> int:
        from metro.models.projection import position_limits

        positions = position_limits(model.config).decoder
        if self.max_new_tokens is None:
            return min(MOST_NEW_TOKENS, positions) if positions else MOST_NEW_TOKENS
        if positions and self.max_new_tokens > positions:
            raise UserError(
                f"max_new_tokens is {self.max_new_tokens}, but the model has {positions} positions"
            )
        return self.max_new_tokens
