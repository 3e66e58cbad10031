"""Label generalisation (Ye et al., 2023, section 4.3): other words for the answer choices.

``replace_words`` maps each label word to its substitute (``Yes -> Agree``); lower-cased words
become lower-cased substitutes. Replaced are the answer choices, in FLIPPED the last piece of
the instruction, in DIRECT and CHANNEL the last sentence of the prompt.

By default (``"words"``) whole words are replaced and nothing else changes. ``"published"`` does
what the published numbers were computed with: any substring ("not" becomes "disagreet"), and for
DIRECT and CHANNEL the sentences of the prompt are joined without the blanks between them.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from metro.data.jsonl_rows import UnusableRow
from metro.evaluation.tasks.examples import EvaluationExample

LABEL_WORDS = ("words", "published", "original")

# End of a sentence for nltk's Punkt, as far as prompts need it: closing quotes may follow; an
# ellipsis, an abbreviation or an initial does not end one.
_SENTENCE_END = re.compile(r"((?<!\.\.)[.?!]['\")\]}]*)(\s+)(?=\S)")
_NO_END = re.compile(r"(?:^|[\s(\"'])(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|e\.g|i\.e|U\.S)\.$")


def replace_label_words(
    example: EvaluationExample, replace_words: Mapping[str, str], how: str = "words"
) -> EvaluationExample:
    """Ask the example in other words.

    Raises:
        UnusableRow: an answer choice is not one of the words.
    """
    if how == "original":
        return example
    for choice in example.choices:
        if choice not in replace_words:
            raise UnusableRow(
                "answer choice without substitute",
                f"{choice!r}; the suite replaces {', '.join(replace_words)}",
            )
    swap = whole_words(replace_words) if how == "words" else substrings(replace_words)
    instruction = example.instruction
    if instruction is not None:
        head, sentinel, last = instruction.rpartition("<extra_id_")
        instruction = head + sentinel + swap(last)
    return dataclasses.replace(
        example,
        input=in_last_sentence(example.input, swap, joined=" " if how == "words" else ""),
        choices=[replace_words[choice] for choice in example.choices],
        instruction=instruction,
    )


def forms(replace_words: Mapping[str, str]) -> dict[str, str]:
    """Return both spellings of every word: as an answer choice, and lower-cased."""
    lowered = {old.lower(): new.lower() for old, new in replace_words.items()}
    return {**replace_words, **lowered}


def whole_words(replace_words: Mapping[str, str]) -> Callable[[str], str]:
    """Replace all words at once, so that no substitute is replaced again."""
    known = forms(replace_words)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, known))})\b")
    return lambda text: pattern.sub(lambda match: known[match.group()], text)


def substrings(replace_words: Mapping[str, str]) -> Callable[[str], str]:
    """Replace one word after the other, also inside of other words."""

    def swap(text: str) -> str:
        for old, new in forms(replace_words).items():
            text = text.replace(old, new)
        return text

    return swap


def in_last_sentence(text: str, swap: Callable[[str], str], joined: str = " ") -> str:
    """Apply ``swap`` to the last sentence; the sentences are joined by ``joined``."""
    cuts = sentence_ends(text)
    if joined:
        start = cuts[-1][1] if cuts else 0
        return text[:start] + swap(text[start:])
    sentences, start = [], 0
    for end, following in cuts:
        sentences.append(text[start:end])
        start = following
    return "".join([*sentences, swap(text[start:])])


def sentence_ends(text: str) -> list[tuple[int, int]]:
    """Return (end, start of the next one) for every sentence but the last."""
    return [
        (match.end(1), match.end(2))
        for match in _SENTENCE_END.finditer(text)
        if not _NO_END.search(text[: match.start(1) + 1])
    ]
