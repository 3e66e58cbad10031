"""FLIPPED: a prompt template split into the instruction and the input instance.

Ye et al. (ICLR 2023), sections 3.1 and 3.2. The instruction is the literal text of a template
outside its Jinja braces, the input instance is what the braces render to. Run k of literal text
becomes ``<extra_id_k>`` in the encoder text, and ``<extra_id_k> run`` in the decoder text::

    {{premise}} Is it true that "{{hypothesis}}"?

    encoder  input: Ann sings.<extra_id_0>Ann can sing.<extra_id_1>
              output: Yes
    decoder  <extra_id_0>  Is it true that "<extra_id_1> "?

``instruction_text`` says which runs the decoder text has:

* ``"published"``: every run of the template, also those of Jinja branches that an example does not
  take (``{% if question == "cause" %} because... {% else %} so... {% endif %}``), as in the paper.
* ``"rendered"``: the runs that were rendered, renumbered from 0, each once: what a reader of the
  prompt sees. Of the templates that FLIPPED trains on it changes the 8 of quartz; of those that it
  is evaluated on, 8 of COPA ("exercise", "i_am_hesitating", "plausible_alternatives", "C1 or C2?
  premise, so/because…", "best_option", "more likely", "cause_effect", "choose") and 2 of WSC ("p
  is/are r", "Who or what is/are"); all others have no condition around literal text, or one whose
  branch every row takes.

Text on disk always has ``<extra_id_k>``. METRO vocabularies have sentinels of their own: there
``<sen001>`` stands for ``<extra_id_0>`` and so on (``<sen000>`` is the mask): ``sentinels_for``.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from metro.data.jsonl_rows import UnusableRow
from metro.utils.messages import UserError

INSTRUCTION_TEXTS = ("published", "rendered")
NO_INSTRUCTION = "no instruction to guess"
SENTINEL = re.compile(r"<extra_id_(\d+)>")
METRO_SENTINEL = re.compile(r"<sen(\d{3,})>")
# Private characters, which no data has: around the number of a run while rendering, and at "|||".
_MARK = re.compile("\ue000(\\d+)\ue001")
_ANSWER_MARK = "\ue002"


class Flipped(NamedTuple):
    """Encoder and decoder text of FLIPPED for one row, without a label."""

    input: str
    """Encoder text: the input instance with sentinels where the instruction was."""
    instruction: str
    """Decoder text: the runs of instruction, each behind its sentinel."""


class Split(NamedTuple):
    """A template cut at the Jinja tags of its input side."""

    pieces: tuple[tuple[str, bool], ...]
    """(text, is it a Jinja tag?) from left to right, up to ``|||``."""
    runs: tuple[str, ...]
    """The literal text between the tags as it is rendered, also where it is blanks only."""
    answer: str | None
    """The Jinja text behind ``|||``, None where there is no such mark."""

    def with_sentinels(self, form: str = "<extra_id_{}>") -> str:
        """Replace run k of the Jinja text by ``form.format(k)``.

        Conditions may enclose ``|||``, so the answer's side stays; the mark becomes a private
        character, as data may contain ``|||``.
        """
        numbers = iter(range(len(self.runs)))
        text = "".join(
            text if is_tag else form.format(next(numbers)) for text, is_tag in self.pieces
        )
        return text if self.answer is None else text + _ANSWER_MARK + self.answer


class Template(Protocol):
    """The part of a ``PromptTemplate`` that this module needs."""

    @property
    def jinja(self) -> str: ...

    def render_text(self, jinja_source: str, row: dict, *, seed: int | None = 0) -> str: ...


@lru_cache(maxsize=8192)
def split_template(jinja: str) -> Split:
    """Cut the part of a template left of ``|||`` at its Jinja tags, as Jinja reads them.

    Raises:
        UserError: it is not a Jinja template.
    """
    from jinja2 import Environment, TemplateSyntaxError

    pieces: list[tuple[str, bool]] = []
    tag, answer = "", None
    try:
        for _, kind, text in Environment().lex(jinja):
            if answer is not None:
                answer += text
            elif kind == "data":  # without the blanks that `-` beside it takes
                text, mark, rest = text.partition("|||")
                pieces += [(text, False)] if text else []
                answer = rest if mark else None
            else:
                tag += text
                if kind.endswith("_end"):
                    pieces.append((tag, True))
                    tag = ""
    except TemplateSyntaxError as error:
        raise UserError(f"{jinja!r} is not a template: {error}") from None
    if tag:  # never closed, which its rendering refuses
        pieces.append((tag, True))
    runs = tuple(text for text, is_tag in pieces if not is_tag)
    return Split(tuple(pieces), runs, answer)


def join_instruction(runs: Sequence[str]) -> str:
    """Write the decoder text of numbered runs: ``<extra_id_0> run_0<extra_id_1> run_1...``."""
    return "".join(f"<extra_id_{number}> {run}" for number, run in enumerate(runs))


def has_text(instruction: str | None) -> bool:
    """Tell whether an instruction has more than sentinels."""
    return bool(SENTINEL.sub("", instruction or "").strip())


def flip(
    template: Template, row: dict, *, instruction_text: str = "published", seed: int | None = 0
) -> Flipped:
    """Split one row under a template into input instance and instruction.

    Args:
        template: the prompt template; its ``render_text`` draws Jinja's ``choice`` by ``seed``.
        row: the dataset's row.
        instruction_text: ``"published"`` or ``"rendered"``, see the top of the module.
        seed: the same as for rendering the prompt and its answer choices, so that they agree.

    Raises:
        UnusableRow: the template has no text outside its braces, or rendered none of it.
        TemplateError: the template fails on this row.
        UserError: ``instruction_text`` is unknown.
    """
    if instruction_text not in INSTRUCTION_TEXTS:
        raise UserError(
            f"instruction_text is {instruction_text!r}; use one of {', '.join(INSTRUCTION_TEXTS)}"
        )
    split = split_template(template.jinja)
    if not split.runs:
        raise UnusableRow(NO_INSTRUCTION, "the template has no text outside its Jinja braces")
    published = instruction_text == "published"
    form = "<extra_id_{}>" if published else "\ue000{}\ue001"
    text = template.render_text(split.with_sentinels(form), row, seed=seed)
    if split.answer is not None and _ANSWER_MARK not in text:
        raise UnusableRow(NO_INSTRUCTION, "the template renders no answer for this row")
    text = text.partition(_ANSWER_MARK)[0].strip()
    if published:
        return Flipped(text, join_instruction(split.runs))
    seen: dict[int, int] = {}  # run -> its new number

    def renumber(mark: re.Match) -> str:
        return f"<extra_id_{seen.setdefault(int(mark.group(1)), len(seen))}>"

    text = _MARK.sub(renumber, text)
    if not seen:
        detail = "the template renders no text outside its Jinja braces for this row"
        raise UnusableRow(NO_INSTRUCTION, detail)
    return Flipped(text, join_instruction([split.runs[run] for run in seen]))


def encoder_text(flipped_input: str, label: str) -> str:
    """Write the encoder text: input instance and label."""
    return f"input: {flipped_input}\n output: {label}"


def model_texts(
    method: str, prompt: str, answer: str, flipped_input: str | None, instruction: str | None
) -> tuple[str, str]:
    """Return the texts that encoder and decoder read under a method.

    direct: prompt, answer. channel: answer, prompt. flipped: input and answer, instruction.
    """
    if method == "direct":
        return prompt, answer
    if method == "channel":
        return answer, prompt
    return encoder_text(flipped_input or "", answer), instruction or ""


def sentinels_for(tokenizer) -> list[str]:
    """Return the tokens of a vocabulary that stand for ``<extra_id_0>``, ``<extra_id_1>``, ...

    Raises:
        UserError: it has neither T5's nor METRO's sentinels.
    """
    names = tokenizer.get_vocab()
    for form, first in (("<extra_id_{}>", 0), ("<sen{:03d}>", 1)):
        found: list[str] = []
        while form.format(first + len(found)) in names:
            found.append(form.format(first + len(found)))
        if found:
            return found
    raise UserError(
        f"{type(tokenizer).__name__} has no sentinels (<extra_id_0> or <sen001>), which FLIPPED "
        "needs; take a T5 or METRO model, or add the tokens to vocabulary and embedding"
    )
