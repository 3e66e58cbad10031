"""Prompted text -> ids, the same for finetuning and evaluation.

Encoder and decoder input of the two kinds of models:

==========  ==================================  ==================
model       source                              target
==========  ==================================  ==================
METRO-T5    ``<s> text </s>``                   ``text </s>``
T5          ``text </s>`` (T0: ``text``)        ``text </s>``
==========  ==================================  ==================

Sentinels count as one token. METRO's tokenizer reads a ``<sen001>`` that is written out in a text
as ordinary characters, as pretraining did; here the text is cut there and the ids joined. METRO's
text itself becomes ids in ``Vocabulary.encode_texts`` alone, here through the tokenizer.
"""

from collections.abc import Sequence

from metro.data.prompts.instruction import SENTINEL, sentinels_for
from metro.utils.messages import UserError, counted

MAX_SOURCE_LENGTH = 512
"""Of all published protocols but one task's; special tokens included."""
TRUNCATION_SIDES = ("right", "left")


class PromptEncoder:
    """Encodes sources and targets with one tokenizer and its special tokens.

    Args:
        tokenizer: of Hugging Face.
        source_special_tokens: whether sources get begin and end symbols (False: as T0's published
            evaluation).
        max_source_length, max_target_length: tokens kept, special ones included.
        truncation_side: the side on which longer sources are cut: ``right`` loses their end,
            ``left`` their beginning. Targets always lose their end.
    """

    def __init__(
        self,
        tokenizer,
        *,
        source_special_tokens: bool = True,
        max_source_length: int = MAX_SOURCE_LENGTH,
        max_target_length: int = 256,
        truncation_side: str = "right",
    ):
        assert truncation_side in TRUNCATION_SIDES
        for name, value in (
            ("max_source_length", max_source_length),
            ("max_target_length", max_target_length),
        ):
            if value < 3:
                raise UserError(f"{name} is {value}; use at least 3")
        self.tokenizer = tokenizer
        ends = tokenizer("", add_special_tokens=True)["input_ids"]
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"{type(tokenizer).__name__} has no end symbol (eos_token)")
        self.begin = [i for i in ends if i != eos] if source_special_tokens else []
        self.end = [eos] if source_special_tokens else []
        self.eos_token_id = eos
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.truncation_side = truncation_side
        self.num_cut_sources = self.num_cut_targets = 0
        self._knows_extra_ids = "<extra_id_0>" in tokenizer.get_vocab()
        self._sentinel_ids: list[int] | None = None

    def sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Encoder ids."""
        ids = [[*self.begin, *self.cut(ids), *self.end] for ids in self.plain(texts)]
        return [i or [self.eos_token_id] for i in ids]  # an empty source cannot be encoded

    def cut(self, ids: list[int], num_added: int = 0) -> list[int]:
        """Cut the ids of a source, and count it.

        Args:
            ids: without special tokens.
            num_added: tokens that will be added beside the special ones.
        """
        room = self.max_source_length - len(self.begin) - len(self.end) - num_added
        if len(ids) <= room:
            return ids
        self.num_cut_sources += 1
        return ids[:room] if self.truncation_side == "right" else ids[len(ids) - room :]

    def labelled_sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Encoder ids of FLIPPED's encoder texts.

        Where one is too long the end of the input is cut, not the label behind it, without which
        all answer choices would be identical.
        """
        room = self.max_source_length - len(self.begin) - len(self.end)
        encoded = self.plain(texts)
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if len(ids) > room:
                tail = self.plain(["output:" + text.rpartition("\n output:")[2]])[0][-room:]
                # On the left the label is at the end of what is kept anyway.
                num_tail = len(tail) if self.truncation_side == "right" else 0
                encoded[number] = [*self.cut(ids, num_tail), *tail[len(tail) - num_tail :]]
        return [[*self.begin, *ids, *self.end] for ids in encoded]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Decoder ids, ending with the end symbol."""
        encoded, room = self.plain(texts), self.max_target_length - 1
        self.num_cut_targets += sum(len(ids) > room for ids in encoded)
        return [[*ids[:room], self.eos_token_id] for ids in encoded]

    def describe_cuts(self, target: str = "target") -> list[str]:
        """Say how many different sources and targets were cut, and what changes it.

        Args:
            target: what the targets are called.
        """
        lost = "end" if self.truncation_side == "right" else "beginning"
        found = []
        if self.num_cut_sources:
            found.append(
                f"{counted(self.num_cut_sources, 'source')} cut at {self.max_source_length} "
                f"tokens, losing the {lost}; --max-source-length and --truncation-side change it"
            )
        if self.num_cut_targets:
            found.append(
                f"{counted(self.num_cut_targets, target)} cut at {self.max_target_length} tokens; "
                "--max-target-length changes it"
            )
        return found

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without special tokens; sentinels are one id each."""
        if self._knows_extra_ids or not any(map(SENTINEL.search, texts)):
            return self._encode(texts)
        cut = [SENTINEL.split(text) for text in texts]  # text, number, text, number, ..., text
        # Texts of one example share most pieces.
        pieces = list(dict.fromkeys(x for parts in cut for x in parts[::2] if x.strip()))
        ids = dict(zip(pieces, self._encode(pieces), strict=True))
        found = []
        for parts in cut:
            row = list(ids[parts[0]]) if parts[0] in ids else []
            for number, piece in zip(parts[1::2], parts[2::2], strict=True):
                row.append(self._sentinel_id(int(number)))
                row += ids.get(piece, [])
            # Blanks alone, without a sentinel, are read as the tokenizer reads them.
            found.append(row if len(parts) > 1 or row else self._encode(parts)[0])
        return found

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # Not verbose: transformers warns of long texts, which are cut and counted here.
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _sentinel_id(self, number: int) -> int:
        if self._sentinel_ids is None:
            tokens = sentinels_for(self.tokenizer)
            self._sentinel_ids = self.tokenizer.convert_tokens_to_ids(tokens)
        if number >= len(self._sentinel_ids):
            raise UserError(
                f"<extra_id_{number}> is in the text, but the vocabulary has "
                f"{len(self._sentinel_ids)} sentinels; use a shorter template or another vocabulary"
            )
        return self._sentinel_ids[number]
