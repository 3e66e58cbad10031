"""What a small METRO model has learnt, on held-out text: blanks, planted words, corrections.

A word in ten is replaced by another, drawn by its frequency. The threshold of the RTD head is set
on the first half of the held-out text; all numbers and examples are of the second half. Where the
head marks a token, the decoder is asked for its most probable other token, reading the text as it
is, wrong words included. Beside it: the most frequent follower of the word before.

Shapes: N texts, T tokens of each, V vocabulary.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from metro.modeling.text_metro_t5 import BOS_ID, EOS_ID
from metro.models.loading import read_tokenizer
from metro.models.pretraining_model import load_pretraining_model
from metro.pretraining.model import MetroPretrainingModel

PLANTED, MASKED = 0.1, 0.15
FALSE_ALARMS = 0.04
"""Aimed at on one half, so that it stays below 5 % on the other."""
DRAWS = 3
"""Times that the text is planted, for less noise in the numbers."""
NUM_SPECIAL = 4
SHOWN = 3
SENTENCE = range(14, 31)
"""Lengths of shown sentences in tokens."""


class Scores(NamedTuple):
    """Measured on held-out text; shares are in percent."""

    auxiliary_bits: float
    """Of the auxiliary model at masked tokens."""
    bigram_bits: float
    recall: float
    """Planted words that the RTD head marks."""
    false_alarms: float
    """Other tokens that it marks: word pieces, punctuation and ``<s>`` are among them, where
    nothing is ever planted."""
    restored: float
    """Planted and marked words that the decoder restores."""
    restored_by_bigram: float
    copied: float
    """Other tokens that are the decoder's most probable ones."""
    precision: float
    """Marked tokens that were planted; 0 if none is marked."""

    @property
    def gate(self) -> dict[str, bool]:
        """What a model must do before it is compared with another."""
        return {
            f"auxiliary model {self.auxiliary_bits:.2f} bits, bigram {self.bigram_bits:.2f}": (
                self.auxiliary_bits < self.bigram_bits
            ),
            f"RTD head marks {self.recall:.0f} % of the planted words (more than 20 %) "
            f"at {self.false_alarms:.1f} % false alarms (less than 5 %)": (
                self.recall > 20 and self.false_alarms < 5
            ),
            f"decoder restores {self.restored:.0f} % of the words marked rightly, "
            f"a bigram {self.restored_by_bigram:.0f} %": self.restored > self.restored_by_bigram,
        }


class Planted(NamedTuple):
    """Texts with planted words, N,T."""

    original: np.ndarray
    corrupted: np.ndarray

    @property
    def is_planted(self) -> np.ndarray:
        return self.original != self.corrupted


class Answer(NamedTuple):
    """What the main model says of texts, N,T."""

    rtd_logits: np.ndarray
    best: np.ndarray
    """The decoder's most probable token."""
    best_other: np.ndarray
    """Its most probable one besides that of the text."""


class Probe:
    """A model beside its data.

    Args:
        model: with auxiliary model and RTD head.
        pieces: the vocabulary, sentinels included.
        data: the folder of `metro prepare-text`.
        half: of the held-out text, 0 or 1, that is measured and shown.
    """

    def __init__(self, model: MetroPretrainingModel, pieces: list[str], data: Path, half: int = 1):
        self.model, self.pieces = model, pieces
        self.mask_id = model.config.decoder_start_token_id  # <sen000>
        train, valid = (
            np.fromfile(data / f"{name}.bin", np.uint16).astype(np.int64)
            for name in ("train", "valid")
        )
        middle = len(valid) // 2
        halves = valid[:middle], valid[middle:]
        self.train, self.measured, self.other = train, halves[half], halves[1 - half]
        self.starts_word = np.array([piece[0] == "▁" for piece in pieces])
        is_word = np.array([piece[0] == "▁" and piece[1:].isalpha() for piece in pieces])
        frequency = np.bincount(self.train, minlength=len(pieces)) * is_word
        self.is_word, self.frequency = is_word, frequency / frequency.sum()
        self.random = np.random.default_rng(1)

    @classmethod
    def load(cls, folder: Path, data: Path, half: int = 1) -> Self:
        """Read the model in a folder that keeps its auxiliary model."""
        model = load_pretraining_model(folder)
        assert model is not None, f"{folder} was exported without its auxiliary model"
        tokenizer = read_tokenizer(str(folder))
        pieces = tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
        return cls(model, pieces, data, half)

    def texts(self, ids: np.ndarray) -> np.ndarray:
        """A half of the held-out text as texts of one length, N,T."""
        length = min(self.model.config.max_positions, 128) - 1
        rows = ids[: len(ids) // length * length].reshape(-1, length)
        return np.pad(rows, ((0, 0), (1, 0)), constant_values=BOS_ID)

    def sentences(self) -> list[np.ndarray]:
        """Some sentences of the measured half, evenly spread."""
        items = np.split(self.measured, np.flatnonzero(self.measured == EOS_ID) + 1)[1:-1]
        fitting = [item for item in items if len(item) in SENTENCE]
        chosen = fitting[:: max(1, len(fitting) // (2 * SHOWN))][: 2 * SHOWN]
        return [np.concatenate([[BOS_ID], item]) for item in chosen]

    def plant(self, texts: np.ndarray) -> Planted:
        """Replace whole words by others, drawn by frequency."""
        ends = np.ones(texts.shape, bool)
        ends[:, :-1] = (self.starts_word | (np.arange(len(self.pieces)) < NUM_SPECIAL))[
            texts[:, 1:]
        ]
        drawn = self.random.choice(len(self.pieces), texts.shape, p=self.frequency)
        chosen = self.is_word[texts] & ends & (self.random.random(texts.shape) < PLANTED)
        return Planted(texts, np.where(chosen, drawn, texts))

    def plant_two(self, ids: np.ndarray) -> Planted:
        """Replace two words or more of a sentence, fewer only where it has no more words."""
        drawn = (self.plant(ids[None]) for _ in range(50))
        return max(drawn, key=lambda planted: min(2, planted.is_planted.sum()))

    @torch.no_grad()
    def ask(self, texts: np.ndarray) -> Answer:
        """Let the main model read texts and write them again."""
        answers = []
        for rows in np.array_split(texts, max(1, len(texts) // 32)):
            ids = torch.from_numpy(rows)
            hidden = self.model.main.encoder(ids).last_hidden_state
            assert self.model.rtd_head is not None, "a model without an RTD head"
            rtd = self.model.rtd_head(hidden).squeeze(-1)
            before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=self.mask_id)
            logits = self.model.main(
                encoder_outputs=(hidden,), decoder_input_ids=before, use_cache=False
            ).logits
            best = logits.argmax(-1)
            logits.scatter_(2, ids.unsqueeze(-1), -torch.inf)
            answers.append([x.numpy() for x in (rtd, best, logits.argmax(-1))])
        return Answer(*map(np.concatenate, zip(*answers, strict=True)))

    @torch.no_grad()
    def fill(self, texts: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Log-probabilities N,M,V of the auxiliary model at masked positions N,M."""
        masked = texts.copy()
        np.put_along_axis(masked, positions, self.mask_id, 1)
        logits = self.model.auxiliary(torch.from_numpy(masked), None, torch.from_numpy(positions))
        return logits.log_softmax(-1)

    def threshold(self) -> float:
        """The RTD logit above which the RTD head marks a token, from the half not measured."""
        planted = self.plant(self.texts(self.other))
        others = self.ask(planted.corrupted).rtd_logits[~planted.is_planted]
        return float(np.quantile(others, 1 - FALSE_ALARMS))

    def score(self, threshold: float, bigram_bits: float) -> Scores:
        """Measure on a half of the held-out text."""
        texts = self.texts(self.measured)
        drawn = np.where(texts < NUM_SPECIAL, 1, self.random.random(texts.shape))  # words alone
        order = drawn.argsort(1)
        positions = np.sort(order[:, : int(MASKED * texts.shape[1])], 1)
        found = self.fill(texts, positions)
        targets = torch.from_numpy(np.take_along_axis(texts, positions, 1)).unsqueeze(-1)
        bits = -float(found.gather(2, targets).mean()) / math.log(2)

        planted = self.plant(np.tile(texts, (DRAWS, 1)))
        answer, wrong = self.ask(planted.corrupted), planted.is_planted
        marked = answer.rtd_logits > threshold
        found_wrong = wrong & marked
        rows, columns = np.nonzero(found_wrong)  # never column 0, which is <s>
        followers = self.followers()[planted.corrupted[rows, columns - 1]]
        followers[np.arange(len(rows)), planted.corrupted[rows, columns]] = -1
        by_bigram = followers.argmax(-1) == planted.original[rows, columns]

        def share(hits: np.ndarray, among: np.ndarray) -> float:
            return 100 * float(hits[among].mean()) if among.any() else 0.0

        return Scores(
            bits,
            bigram_bits,
            share(marked, wrong),
            share(marked, ~wrong),
            share(answer.best_other == planted.original, found_wrong),
            100 * float(by_bigram.mean()) if len(rows) else 0.0,
            share(answer.best == planted.original, ~wrong),
            share(wrong, marked),
        )

    def followers(self) -> np.ndarray:
        """V,V: how often the second token follows the first in the training text."""
        counts = np.zeros((len(self.pieces),) * 2, np.int32)
        np.add.at(counts, (self.train[:-1], self.train[1:]), 1)
        return counts

    def show(self, threshold: float, console: Console) -> None:
        """Print sentences with a blank, and sentences with planted words."""
        sentences = self.sentences()
        console.print("The auxiliary model fills a blank (held-out text; the original in green):")
        for ids in sentences[:SHOWN]:
            words = [t for t in np.flatnonzero(self.is_word[ids]) if t > len(ids) // 3]
            if words:
                console.print(self.blank(ids, int(words[0])))
        console.print(
            "\nPlanted words: what the RTD head marks, and the decoder's other word there:"
        )
        for ids in sentences[SHOWN:]:
            planted = self.plant_two(ids)
            answer = self.ask(planted.corrupted)
            console.print(self.corrected(planted, answer, answer.rtd_logits[0] > threshold))

    def blank(self, ids: np.ndarray, position: int) -> Text:
        """One sentence with a blank, and the three most probable tokens."""
        found = self.fill(ids[None], np.array([[position]]))[0, 0].exp().topk(3)
        line = self.line("  text    ", ids, {position: ("____", "bold")})
        line.append("\n  filled  ")
        for share, token in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            style = "green" if token == ids[position] else ""
            line.append(f"{self.pieces[token].replace('▁', '')} ", style)
            line.append(f"{share:.0%}  ", "dim")
        return line.append(f"(was: {self.pieces[ids[position]].replace('▁', '')})\n")

    def corrected(self, planted: Planted, answer: Answer, marked: np.ndarray) -> Text:
        """One sentence with planted words: as it is, marked, corrected."""
        original, corrupted = planted.original[0], planted.corrupted[0]
        wrong = original != corrupted

        def word(token: int) -> str:
            return self.pieces[token].replace("▁", "")

        shown = {t: (word(corrupted[t]), "bold magenta") for t in np.flatnonzero(wrong)}
        marks = {
            t: (f"[{word(corrupted[t])}]", "bold green" if wrong[t] else "yellow")
            for t in np.flatnonzero(marked)
        }
        other = {
            t: (word(token), "bold green" if token == original[t] else "red")
            for t, token in enumerate(answer.best_other[0])
            if marked[t]
        }
        was = ", ".join(f"{word(corrupted[t])} (was: {word(original[t])})" for t in shown)
        line = self.line("  text    ", corrupted, shown)
        line.append(f"\n  planted {was or 'none'}")
        line.append(self.line("\n  marked  ", corrupted, marks))
        return line.append(self.line("\n  decoder ", corrupted, other)).append("\n")

    def line(self, title: str, ids: np.ndarray, instead: dict[int, tuple[str, str]]) -> Text:
        """A sentence in which some tokens are shown another way: position -> (text, style)."""
        line = Text(title)
        for t, token in enumerate(ids):
            if token < NUM_SPECIAL:
                continue
            piece = self.pieces[token]
            text, style = instead.get(t, (piece.replace("▁", ""), ""))
            line.append(" " * (piece[0] == "▁" and t > 1))
            line.append(text, style)
        return line


def bigram_bits(data: Path) -> float:
    """The reference line that `metro prepare-text` has counted."""
    return float(json.loads((data / "prepare_text.json").read_text())["reference_bits"]["bigram"])
