"""The METRO-T5 tokenizer for Hugging Face: the normaliser and vocabulary of ``text_metro_t5``.

Text -> ``<s> ids </s>``; two texts -> ``<s> a </s></s> b </s>``; as ``text_target``, what the
decoder is trained to write, without ``<s>``. Behind the ids of ``dict.txt``
come the sentinels ``<sen000>``, ``<sen001>``, ...; they are part of the vocabulary, and like any
other text when they are written out in an input, as they were in training.

Not built on the Rust library ``tokenizers``: it cannot express the normaliser, and its rebuild of
the SentencePiece model is slower and gives other ids for letters with combining marks (it does not
compose them), for runs of one character (of equally good cuts it takes another one), and for a
literal ``[MASK]`` in cased text. ``benchmarks/tokenizer.py`` measures both.
"""

import re
import shutil
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizer

from .text_metro_t5 import (
    BOS_ID,
    DICT_FILE,
    EOS_ID,
    NUM_SPECIAL_IDS,
    PAD_ID,
    SPM_FILE,
    UNK_ID,
    Vocabulary,
    normalize_text,
)

VOCAB_FILES_NAMES = {"vocab_file": SPM_FILE, "dict_file": DICT_FILE}


_BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")


def _bytes_as_text(pieces: re.Match) -> str:
    """Decode the byte pieces of SentencePiece's byte fallback."""
    return bytes.fromhex(pieces[0].replace("<0x", "").replace(">", "")).decode(errors="replace")


class MetroT5Tokenizer(PreTrainedTokenizer):
    """Reads the tokenizer files of released METRO-T0 folders and of our own exports.

    Args:
        vocab_file: ``sp.model``.
        dict_file: ``dict.txt``, in the same folder; it must give the same pieces the same ids.
        lower: fold to lower case.
        n_sentinel_tokens: how many sentinels follow the vocabulary.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    start_ids = [BOS_ID]
    """In front of a text; none in front of a target."""

    def __init__(
        self,
        vocab_file: str,
        dict_file: str,
        lower: bool = True,
        n_sentinel_tokens: int = 512,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        clean_up_tokenization_spaces: bool = True,
        **kwargs,
    ):
        if Path(vocab_file).parent != Path(dict_file).parent:
            raise ValueError(f"{vocab_file} and {dict_file} must be in one folder")
        self.lower, self.n_sentinel_tokens = lower, n_sentinel_tokens
        self.vocabulary = Vocabulary.from_folder(Path(vocab_file).parent)
        processor = self.vocabulary.processor
        self._tokens = [str(bos_token), str(pad_token), str(eos_token), str(unk_token)]
        self._tokens += processor.id_to_piece(list(range(NUM_SPECIAL_IDS, len(self.vocabulary))))
        self._tokens += [f"<sen{number:03d}>" for number in range(n_sentinel_tokens)]
        ids = range(NUM_SPECIAL_IDS, len(self.vocabulary))
        self._has_bytes = any(map(processor.is_byte, ids))  # of a vocabulary from elsewhere
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        # Given by id, so that they strip blanks around them, also in what older versions saved.
        special = {
            index: token
            if isinstance(token, AddedToken)
            else AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
            for index, token in enumerate((bos_token, pad_token, eos_token, unk_token))
        }
        super().__init__(
            bos_token=special[BOS_ID],
            pad_token=special[PAD_ID],
            eos_token=special[EOS_ID],
            unk_token=special[UNK_ID],
            cls_token=str(cls_token),
            sep_token=str(sep_token),
            lower=lower,
            n_sentinel_tokens=n_sentinel_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            added_tokens_decoder={**kwargs.pop("added_tokens_decoder", {}), **special},
            **kwargs,
        )
        self._update_trie()

    @property
    def vocab_size(self) -> int:
        """Ids with special ones and sentinels: the size of the models' embedding."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        pieces = self.vocabulary.processor.encode(normalize_text(text, self.lower), out_type=str)
        return pieces or [""]  # of blanks alone; as in training it counts as one unknown token

    def tokenize(self, text: str, **kwargs) -> list[str]:
        if kwargs or not self._is_plain(text):
            pieces = super().tokenize(text, **kwargs)
            return [piece for piece in pieces if piece] or pieces  # blanks between added tokens
        return self._tokenize(text) if text else []

    def _is_plain(self, text: str) -> bool:
        """Check that no token that is matched as a whole occurs: most texts, and the fast way."""
        for token in self._added_tokens_encoder:  # a loop, as any() costs more than the search
            if token in text:
                return False
        return True

    def _encode_plus(self, text, text_pair=None, **kwargs):
        """Replace plain texts by their ids, which saves the conversion of pieces as strings."""
        if kwargs.pop("return_offsets_mapping", False):
            raise NotImplementedError(
                "return_offsets_mapping is True, but METRO's normaliser changes the text before it "
                "is cut, so that tokens have no place in it; leave return_offsets_mapping out"
            )
        unusual = ("is_split_into_words", "split_special_tokens", "sanitize_control_tokens")
        if not any(kwargs.get(name) for name in unusual):
            text, text_pair = self._ids_of_plain(text), self._ids_of_plain(text_pair)
        return super()._encode_plus(text, text_pair, **kwargs)

    def _ids_of_plain(self, text):
        """SentencePiece's ids of a text, or of each text of a batch; what is not plain stays."""
        if isinstance(text, list) and all(isinstance(one, str) for one in text):
            return [self._ids_of_plain(one) for one in text]
        if not isinstance(text, str) or not text or not self._is_plain(text):
            return text
        if len(self._added_tokens_encoder) > NUM_SPECIAL_IDS:
            return self.convert_tokens_to_ids(self.tokenize(text))  # a piece may be an added token
        return self.vocabulary.encode(text, self.lower)[:-1] or [UNK_ID]  # </s> is added later

    def convert_tokens_to_ids(self, tokens):
        if not isinstance(tokens, list):
            return super().convert_tokens_to_ids(tokens)
        added, ids = self._added_tokens_encoder, self._ids
        return [added[t] if t in added else ids.get(t, UNK_ID) for t in tokens]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, UNK_ID)

    def _convert_id_to_token(self, index: int) -> str:
        if index >= len(self._tokens):
            return ""  # a row that pads the model's embedding
        if index < 0:
            raise ValueError(
                f"id {index} is not one of the {len(self._tokens)} in the vocabulary; replace -100 "
                "in labels by the padding id first"
            )
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        # A token that was added to the vocabulary has no mark of the blank before it.
        added = self._added_tokens_encoder.keys() - self._ids.keys()
        text = "".join(
            f" {token.lstrip()}" if token in added else token.replace("▁", " ") for token in tokens
        )
        if self._has_bytes:
            text = _BYTES.sub(_bytes_as_text, text)
        return text.strip()

    def convert_ids_to_tokens(self, ids, skip_special_tokens: bool = False):
        if skip_special_tokens and not isinstance(ids, int):
            sentinels = range(len(self.vocabulary), len(self._tokens))
            ids = [index for index in ids if int(index) not in sentinels]
        return super().convert_ids_to_tokens(ids, skip_special_tokens)

    def _switch_to_input_mode(self) -> None:
        self.start_ids = [BOS_ID]

    def _switch_to_target_mode(self) -> None:
        self.start_ids = []

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        ids = [*self.start_ids, *token_ids_0, EOS_ID]
        return ids if token_ids_1 is None else [*ids, EOS_ID, *token_ids_1, EOS_ID]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        if already_has_special_tokens:
            return [int(index in self.all_special_ids) for index in token_ids_0]
        mask = [*[1] * len(self.start_ids), *[0] * len(token_ids_0), 1]
        return mask if token_ids_1 is None else [*mask, 1, *[0] * len(token_ids_1), 1]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The models have no token types: all 0."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy ``sp.model`` and ``dict.txt``."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        written = []
        for name in VOCAB_FILES_NAMES.values():
            source, target = self.vocabulary.folder / name, Path(save_directory) / (prefix + name)
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
            written.append(str(target))
        return tuple(written)
