"""Strings per second of the tokenizer beside the plain way, one thread, same ids checked.

Three stages, each beside what the original does there: the normaliser (the plain one looks at one
character after the other), text to ids (SentencePiece pieces of one text, each looked up in the
dictionary), and the Hugging Face tokenizer called on a batch (its base class with the plain
normaliser). Seconds are processor time, so that other processes on the machine matter little.

A rebuild with the Rust library `tokenizers` is measured as well: SentencePiece's model, its table
of characters and its blanks, behind our normaliser, which that library cannot express. It is no
alternative: slower, and it gives other ids for letters with combining marks (the library applies
the table to whole graphemes, so that it does not compose them) and for runs of one character (of
equally good cuts it takes another one). `hostile texts that differ` counts lines made of these.

    python -m benchmarks.tokenizer [--vocab DIR] [FILE...]

Without files it reads the documentation in the installed packages, and without a vocabulary it
trains one of 8,000 pieces on the text.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, print_table, write_results
from benchmarks.plain_chain import normalize_plainly
from metro.modeling.text_metro_t5 import Vocabulary, normalize_text
from scripts.demo_text import write_demo_text

UNK = 3


def read_texts(paths, most):
    """Lines that hold something; the whole of a file is spread over."""
    lines = [line for path in paths for line in open(path, encoding="utf-8") if line.strip()]
    return lines[:: max(1, len(lines) // most)][:most]


def hostile_texts(count=2000):
    """Random lines of what is known to be difficult."""
    rng = random.Random(0)
    parts = [
        "a\u0301",
        "e\u0301\u0323",
        "\u0300",
        "\u3042\u3099",
        "\u200d",
        "\u00bd",
        "\ufb01",
        "\u1e9e",
    ]
    parts += ["aaaaaaa", "zzzzz", "----", "ll", "[MASK]", "word", "'", ".", " ", " "]
    return ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]


def plain_hugging_face(folder):
    """The tokenizer as the original has it: nothing but what the base class asks for."""
    from transformers import PreTrainedTokenizer

    from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer

    class Plain(MetroT5Tokenizer):
        tokenize = PreTrainedTokenizer.tokenize
        _encode_plus = PreTrainedTokenizer._encode_plus
        convert_tokens_to_ids = PreTrainedTokenizer.convert_tokens_to_ids

        def _tokenize(self, text, **kwargs):
            text = normalize_plainly(text, self.lower)
            return self.vocabulary.processor.encode(text, out_type=str) or [""]

    return Plain(str(folder / "sp.model"), str(folder / "dict.txt"))


def rust_rebuild(folder):
    """SentencePiece's model in `tokenizers`, as exact as that library allows."""
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    model = proto.ModelProto()
    model.ParseFromString((folder / "sp.model").read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNK, byte_fallback=False))
    steps = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if table := model.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(table))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return tokenizer


def measure(ways, texts, repeats):
    """Median processor seconds of each way on the texts; they take turns."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way(texts)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=Path, help="text files")
    parser.add_argument("--vocab", type=Path, help="folder: sp.model and dict.txt")
    parser.add_argument("--texts", type=int, default=10_000, help="how many lines")
    parser.add_argument("--repeats", type=int, default=7, help="runs of either side")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if not args.inputs:
            args.inputs = [work / "english.txt"]
            write_demo_text(args.inputs[0], 8_000_000)
        if not args.vocab:
            args.vocab = work / "vocab"
            command = [
                sys.executable,
                "-m",
                "metro.cli.main",
                "prepare-text",
                "--train-vocab",
                8000,
            ]
            command += ["--out", args.vocab, "--input", *args.inputs]
            subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        rows, facts = compare(args.vocab, read_texts(args.inputs, args.texts), args.repeats)
    print_table(
        rows, f"{facts['texts']:,} texts of {facts['mean_characters']} characters, 1 thread"
    )
    for key in ("hostile_texts_that_differ", "texts_that_differ"):
        print(f"{key.replace('_', ' ')} with the Rust library: {facts[key]}")
    write_results("tokenizer", rows, **facts)


def compare(folder, texts, repeats):
    from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer

    vocabulary = Vocabulary.from_folder(folder)
    encode = vocabulary.processor.encode
    ids = {piece: number for number, piece in enumerate(vocabulary.processor.id_to_piece(
        list(range(len(vocabulary)))))}  # fmt: skip
    ours = MetroT5Tokenizer(str(folder / "sp.model"), str(folder / "dict.txt"))
    plain, rust = plain_hugging_face(folder), rust_rebuild(folder)

    def plain_ids(texts):
        pieces = (encode(normalize_plainly(text, True), out_type=str) for text in texts)
        return [[ids.get(piece, UNK) for piece in line] for line in pieces]

    def our_ids(texts):
        return [ids[:-1] for ids in vocabulary.encode_texts(texts, True)]

    def rust_ids(texts):
        normalized = [normalize_text(text, True) for text in texts]
        return [line.ids for line in rust.encode_batch_fast(normalized)]

    stages = {
        "normaliser": {
            "plain": lambda texts: [normalize_plainly(text, True) for text in texts],
            "metro": lambda texts: [normalize_text(text, True) for text in texts],
        },
        "text to ids": {"plain": plain_ids, "metro": our_ids, "Rust tokenizers": rust_ids},
        "Hugging Face tokenizer": {
            "plain": lambda texts: plain(texts)["input_ids"],
            "metro": lambda texts: ours(texts)["input_ids"],
        },
    }
    hostile = hostile_texts()
    rows = []
    for stage, ways in stages.items():
        results = {name: way(texts) for name, way in ways.items()}  # also warms up
        if results["plain"] != results["metro"] or ways["plain"](hostile) != ways["metro"](hostile):
            sys.exit(f"{stage}: both sides must give the same")
        seconds = measure(ways, texts, repeats)
        rows += [
            {
                "stage": stage,
                "way": name,
                "strings per second": round(len(texts) / seconds[name]),
                "x plain": round(seconds["plain"] / seconds[name], 2),
            }
            for name in ways
        ]

    def differing(texts):
        pairs = zip(our_ids(texts), rust_ids(texts), strict=True)
        return f"{sum(a != b for a, b in pairs)} of {len(texts)}"

    return rows, {
        "texts": len(texts),
        "mean_characters": round(sum(map(len, texts)) / len(texts)),
        "pieces": len(vocabulary),
        "texts_that_differ": differing(texts),
        "hostile_texts_that_differ": differing(hostile),
    }


if __name__ == "__main__":
    main()
