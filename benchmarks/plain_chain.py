"""The plain way from text to SentencePiece pieces, as the original pipeline does it: line by line.

Reads text, writes lines of pieces for `fairseq-preprocess`. The splitter looks at one character
after the other and remembers nothing. Serves as the slow side of `prepare_text.py` and as an
independent second implementation in the tests.
"""

import argparse
import re
import string
import unicodedata
from multiprocessing import Pool

TRANSLATION = str.maketrans("‘’´“”—–-", "'''\"\"---")


def is_punctuation(char):
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def split_prefix(token):
    """Return the end of the leading punctuation; 0 where nothing else follows."""
    for i in range(1, len(token)):
        if not is_punctuation(token[i]):
            return i
    return 0


def split_suffix(token):
    """Return the start of the trailing punctuation; the length where nothing precedes it."""
    for i in range(len(token) - 2, -1, -1):
        if not is_punctuation(token[i]):
            return i + 1
    return len(token)


def normalize_plainly(text, lower):
    text = text.strip().replace("``", '"').replace("''", '"').translate(TRANSLATION)
    words = []
    for token in text.split():
        if len(token) > 1 and is_punctuation(token[0]):
            i = split_prefix(token)
            if i > 0:
                words.append(token[:i])
            token = token[i:]
            if is_punctuation(token[-1]):
                i = split_suffix(token)
                words.append(token[:i])
                if i < len(token):
                    words.append(token[i:])
            else:
                words.append(token)
        elif len(token) > 1 and is_punctuation(token[-1]):
            i = split_suffix(token)
            words.append(token[:i])
            if i < len(token):
                words.append(token[i:])
        else:
            words.append(token)
    text = " ".join(words)
    text = re.sub(r"' ([smdSMDtT])\b", r"'\1", text)
    text = re.sub(r"' ll\b", "'ll", text)
    text = re.sub(r"' re\b", "'re", text)
    text = re.sub(r"' ve\b", "'ve", text)
    text = re.sub(r"' LL\b", "'LL ", text)
    text = re.sub(r"' RE\b", "'RE ", text)
    text = re.sub(r"' VE\b", "'VE ", text)
    text = " ".join(text.split())
    return text.lower() if lower else text


def load(model, lower):
    global processor, lower_case
    from sentencepiece import SentencePieceProcessor

    processor, lower_case = SentencePieceProcessor(model_file=model), lower


def encode(line):
    return " ".join(processor.encode(normalize_plainly(line, lower_case), out_type=str))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--lower", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("inputs", nargs="+")
    args = parser.parse_args()
    with (
        open(args.out, "w", encoding="utf-8") as out,
        Pool(args.workers, load, (args.model, args.lower)) as pool,
    ):
        for number, path in enumerate(args.inputs):
            if number:
                out.write("\n")
            with open(path, encoding="utf-8") as lines:
                for pieces in pool.imap(encode, lines, 1000):
                    out.write(pieces + "\n")


if __name__ == "__main__":
    main()
