"""Widths and numbers of weights of a T5 or METRO-T5 model, from its configuration alone.

Names: D width, I heads x head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro.models.registry import known_config
from metro.models.source import ADAPTER_CONFIG, adapter_base, model_source
from metro.utils.files import read_json
from metro.utils.messages import UserError

T5, METRO = ("t5", "mt5", "umt5"), ("metro_t5", "fairseq_t5")


@dataclass(frozen=True)
class Matrix:
    """Equal matrices of a model."""

    rows: int
    columns: int
    count: int = 1
    part: str = ""
    """``encoder``, ``decoder``, or ``""`` of both: embeddings."""
    rounded: bool = True
    """``load_in`` rounds it: not embeddings, the projection to the vocabulary, or T5's ``wo``."""

    @property
    def size(self) -> int:
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class Sizes:
    """What memory depends on."""

    is_metro: bool
    width: int
    inner: int
    feed_forward: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    vocabulary: int
    is_gated: bool
    is_tied: bool
    position_rows: int = 0
    buckets: int = 32
    auxiliary_layers: int = 0
    """Of METRO pretraining: the auxiliary model shares the embedding."""

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str, auxiliary_layers: int = 0) -> Sizes:
        """Read a ``config.json``.

        Raises:
            UserError: it is of another kind of model, or lacks a size.
        """
        kind = config.get("model_type")
        if kind not in (*T5, *METRO):
            raise UserError(
                f"{source} is a model of type {kind}; metro plan knows T5 and METRO-T5 models"
            )
        is_metro = kind in METRO
        try:
            return cls(
                is_metro=is_metro,
                width=config["d_model"],
                inner=config["d_kv"] * config["num_heads"],
                feed_forward=config["d_ff"],
                heads=config["num_heads"],
                encoder_layers=config["num_layers"],
                decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
                vocabulary=config["vocab_size"],
                is_gated="gated" in config.get("feed_forward_proj", "relu"),
                is_tied=is_metro or config.get("tie_word_embeddings", True),
                position_rows=config.get("max_positions", 1024) + 2 if is_metro else 0,
                buckets=config.get("relative_attention_num_buckets", 32),
                auxiliary_layers=auxiliary_layers,
            )
        except KeyError as error:
            raise UserError(f"the config.json of {source} has no {error.args[0]}") from None

    @classmethod
    def find(cls, model: str) -> Sizes:
        """Return those of a registered name, a folder, or a hub id, of which no weights are read.

        Raises:
            UserError: there is no such model.
        """
        known = known_config(model)
        if known is not None:
            return cls.of(known, model)
        source = Path(model_source(model))
        if source.is_file():
            raise UserError(f"{source} is a fairseq checkpoint: name the folder of its export")
        if (source / ADAPTER_CONFIG).is_file():
            return cls.find(adapter_base(source))
        if not source.is_dir():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

            try:
                source = Path(hf_hub_download(model, "config.json")).parent
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{model} has no config.json on the hub ({reason})") from None
        return cls.of(read_json(source / "config.json") or {}, model)

    @property
    def embedding(self) -> int:
        """Weights of the embedding."""
        return self.vocabulary * self.width

    def matrices(self) -> list[Matrix]:
        """All weight matrices."""
        D, inner, F = self.width, self.inner, self.feed_forward  # noqa: N806
        found = [Matrix(self.vocabulary, D, 1 if self.is_tied else 2, rounded=False)]
        layers = self.encoder_layers + self.auxiliary_layers
        for part, count, attentions in (
            ("encoder", layers, 1),
            ("decoder", self.decoder_layers, 2),
        ):
            found += [
                Matrix(inner, D, 4 * attentions * count, part),
                Matrix(F, D, (2 if self.is_gated else 1) * count, part),
                Matrix(D, F, count, part, rounded=self.is_metro),
            ]
        if self.is_metro:
            tables = 3 if self.auxiliary_layers else 2
            found.append(Matrix(self.position_rows, D, tables, rounded=False))
        if self.auxiliary_layers:
            found.append(Matrix(D, D, 1, "encoder"))
        return found

    @property
    def vectors(self) -> int:
        """Weights outside of matrices: biases, norms, tables of distances."""
        D, inner, F = self.width, self.inner, self.feed_forward  # noqa: N806
        layers, tables = self.encoder_layers + self.auxiliary_layers, self.buckets * self.heads
        if not self.is_metro:
            norms = 2 * self.encoder_layers + 3 * self.decoder_layers + 2
            return norms * D + 2 * tables
        attention, feed_forward = 3 * inner + D + 2 * D, F + D + 2 * D
        total = layers * (attention + feed_forward)
        total += self.decoder_layers * (2 * attention + feed_forward) + 4 * D + layers * tables
        return total + bool(self.auxiliary_layers) * (6 * D + 1 + self.vocabulary)

    @property
    def weights(self) -> int:
        """All weights, shared ones once."""
        return total(self.matrices()) + self.vectors

    @property
    def largest_block(self) -> int:
        """Weights of a decoder layer."""
        of_decoder = [matrix for matrix in self.matrices() if matrix.part == "decoder"]
        return total(of_decoder) // self.decoder_layers

    @property
    def rounded(self) -> int:
        """Weights that ``load_in`` rounds."""
        return total(matrix for matrix in self.matrices() if matrix.rounded)

    def adapters(self, rank: int) -> list[Matrix]:
        """LoRA adapters of all linear layers, two of each."""
        linear = [m for m in self.matrices() if m.part]
        down = [Matrix(rank, m.columns, m.count, m.part) for m in linear]
        return down + [Matrix(m.rows, rank, m.count, m.part) for m in linear]


def total(matrices: Iterable[Matrix]) -> int:
    """Weights of matrices."""
    return sum(matrix.size for matrix in matrices)
