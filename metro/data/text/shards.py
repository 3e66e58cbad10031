"""A corpus in shards: what each of them reads, and the manifest that lists them.

A shard is a folder like that of a corpus without shards, ``OUT/00003-of-00016``. It has a share of
every large file, cut between documents, and whole files in turn, so that it is a fair sample of the
corpus. ``OUT/prepare_text.json`` is written when all are there; it has the checksums of their
manifests, so that a shard of another corpus is refused.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from metro.data.prepared_folder import SHARDS, TEXT_MANIFEST
from metro.data.text.reading import CHUNK_BYTES, TextSource
from metro.modeling.text_metro_t5 import VOCABULARY_FILES
from metro.utils.checksums import facts
from metro.utils.files import new_file, read_json, write_json
from metro.utils.messages import UserError, shortened

CUT_BYTES = 8 << 20
"""Larger files are cut, unless they are compressed."""


def names(number: int) -> list[str]:
    """Name the folders of so many shards."""
    return [f"{shard:05d}-of-{number:05d}" for shard in range(number)]


def refuse_other_shards(out: Path, expected: Sequence[str]) -> None:
    """Refuse a folder that holds a corpus in other shards, or in none where some are expected."""
    there = {path.name for path in out.glob(SHARDS) if path.is_dir()}
    whole = bool(expected) and (out / "train.idx").exists()
    if others := sorted(there - {*expected}) or ["train.idx"] * whole:
        raise UserError(
            f"{out} holds a corpus in {shortened(others)}: choose another --out, or remove it"
        )


def sources_of(corpus: Sequence[TextSource], shard: int, number: int) -> list[TextSource]:
    """Return what a shard reads; every document of the corpus is in one of them.

    Raises:
        UserError: a shard would be empty.
    """
    found, num_whole = [], 0
    for source in corpus:
        size = source.size()
        if source.is_gzip or size is None or size < CUT_BYTES:
            if num_whole % number == shard:
                found.append(source)
            num_whole += 1
        else:
            start, end = (first_document(source, size * k // number) for k in (shard, shard + 1))
            if start < end:
                found.append(replace(source, start=start, end=end))
    if not found:
        raise UserError(
            f"nothing is left for shard {shard} of {number}: use fewer shards (files that are "
            "compressed or small are not cut, others at empty lines or between records)"
        )
    return found


def first_document(source: TextSource, position: int) -> int:
    """Return where the next document begins, seen from a byte of a file; 0 from its beginning."""
    if position == 0:
        return 0
    place = position - 1
    is_line_start = False
    with open(source.name, "rb") as file:
        file.seek(place)
        for piece in iter(partial(file.readline, CHUNK_BYTES), b""):
            place += len(piece)
            is_line_end = piece.endswith(b"\n")
            if is_line_end and (source.is_jsonl or (is_line_start and not piece.strip())):
                break
            is_line_start = is_line_end
    return place


def join(out: Path, expected: Sequence[str]) -> dict:
    """Write the vocabulary and the manifest of the corpus beside its finished shards; return it."""
    manifests = [read_json(out / name / TEXT_MANIFEST) for name in expected]
    first = manifests[0]
    for name in VOCABULARY_FILES:
        with new_file(out / name, overwrite=True) as temporary:
            shutil.copyfile(out / expected[0] / name, temporary)
    counts = {name: sum(one["counts"][name] for one in manifests) for name in first["counts"]}
    listed = [*VOCABULARY_FILES, *(f"{name}/{TEXT_MANIFEST}" for name in expected)]
    manifest = {
        "settings": {name: first["settings"][name] for name in ("format", "vocab", "lower")},
        "shards": [*expected],
        "counts": {**counts, "vocab_size": first["counts"]["vocab_size"]},
        "reference_bits": first["reference_bits"],
        "files": {name: facts(out / name) for name in listed},
    }
    write_json(out / TEXT_MANIFEST, manifest, seal=True)
    return manifest
