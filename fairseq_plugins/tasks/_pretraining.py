"""Options, shards and dataset of both pretraining tasks."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fairseq import utils
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks.language_modeling import SAMPLE_BREAK_MODE_CHOICES, SHORTEN_METHOD_CHOICES
from omegaconf import II, MISSING

from fairseq_plugins.data import Corruption, PretrainingDataset, check_files
from fairseq_plugins.option import config_option
from fairseq_plugins.tasks._common import SentinelTask
from metro.utils.messages import UserError

logger = logging.getLogger(__name__)


@dataclass
class PretrainingConfig(FairseqDataclass):
    data: str = config_option(
        MISSING,
        "folder with dict.txt and binarised splits; several shards: folders joined by "
        "colons, one is read per epoch, in turn",
    )
    sample_break_mode: SAMPLE_BREAK_MODE_CHOICES = config_option(
        "none",
        "none: blocks of exactly tokens-per-sample; complete: whole sentences; "
        "complete_doc: whole sentences of one document; eos: one sentence",
    )
    tokens_per_sample: int = config_option(
        512, "longest example, <s> included; also the number of sentinels"
    )
    mask_prob: float = config_option(0.15, "share of tokens that are masked")
    shorten_method: SHORTEN_METHOD_CHOICES = config_option(
        "none", "what to do with items longer than an example"
    )
    shorten_data_split_list: str = config_option(
        "", 'splits to shorten, e.g. "train,valid"; empty: all'
    )
    seed: int = II("common.seed")


def check_shares(cfg, *names: str) -> None:
    """Refuse options that are not a share, or that make more than a whole together."""
    values = [getattr(cfg, name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not 0 <= value <= 1:  # also NaN
            raise UserError(f"{name} is {value}; it is a share: use 0 to 1")
    if sum(values) > 1:
        raise UserError(f"{' + '.join(names)} is {sum(values):g}; together they are at most 1")


def check_mask_length(cfg) -> None:
    """Refuse spans of no token."""
    if cfg.mask_multiple_length < 1:
        raise UserError(f"mask_multiple_length is {cfg.mask_multiple_length}; use 1 or more")


class PretrainingTask(SentinelTask):
    """Base of the tasks `t5_metro` and `t5`."""

    merge: Callable
    """Merges examples: a function of `metro.data.collation`."""

    def __init__(self, cfg: PretrainingConfig, dictionary: Dictionary):
        super().__init__(cfg, dictionary)
        check_shares(cfg, "mask_prob")

    @classmethod
    def setup_task(cls, cfg: PretrainingConfig, **kwargs):
        return cls(cfg, cls.read_dictionary(cfg.data))

    @classmethod
    def read_dictionary(cls, data: str) -> Dictionary:
        """Read the vocabulary of the first shard; the others must have the same, or none."""
        folders = utils.split_paths(data)
        paths = [Path(folder, "dict.txt") for folder in folders]
        if not paths[0].exists():
            raise UserError(
                f"no dict.txt in the data folder {folders[0]}; it is written by "
                "`metro prepare-text` and fairseq-preprocess: copy the one that the data was "
                "binarised with, or check task.data"
            )
        for path in paths[1:]:
            if path.exists() and path.read_bytes() != paths[0].read_bytes():
                raise UserError(
                    f"{path} differs from {paths[0]}; all shards must be binarised with the same "
                    "vocabulary"
                )
        dictionary = Dictionary.load(str(paths[0]))
        logger.info("dictionary: %s types", f"{len(dictionary):,}")
        return dictionary

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Open one split, memory-mapped; with several shards, the one of this epoch."""
        folders = utils.split_paths(self.cfg.data)
        path = os.path.join(folders[(epoch - 1) % len(folders)], split)
        # `combine` is what the trainer asks for where it trains. All shards are looked at then, so
        # that a bad one stops the run now and not epochs later.
        for folder in folders if combine else [os.path.dirname(path)]:
            check_files(os.path.join(folder, split))
        splits = self.cfg.shorten_data_split_list
        shorten = not splits or split in splits.split(",")
        self.datasets[split] = PretrainingDataset(
            data_utils.load_indexed_dataset(path, self.dictionary, combine=combine),
            corruption=self.corruption(),
            merge=partial(
                self.merge,
                pad=self.dictionary.pad(),
                start=self.first_sentinel,
                max_width=self.max_width,
            ),
            break_mode=str(self.cfg.sample_break_mode),
            tokens_per_sample=self.cfg.tokens_per_sample,
            crop=str(self.cfg.shorten_method) if shorten else "none",
            bos=self.dictionary.bos(),
            vocab_size=self.first_sentinel,
            seed=self.cfg.seed,
            name=path,
        )

    def corruption(self) -> Corruption:
        """Return what makes an example of a block."""
        raise NotImplementedError
