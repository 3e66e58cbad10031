"""Options, shards and dataset of both pretraining tasks."""

import logging
from dataclasses import dataclass
from pathlib import Path

from fairseq.data import Dictionary, data_utils
from fairseq.dataclass import FairseqDataclass
from omegaconf import II, MISSING

from fairseq_plugins.data import FairseqPretrainingDataset
from fairseq_plugins.option import config_option, options_of
from fairseq_plugins.tasks._common import SentinelTask, load_dictionary
from metro.data.indexed_file import check_dictionaries, check_shards
from metro.data.prepared_folder import shard_folders
from metro.pretraining.settings import TaskOptions, check_shares
from metro.utils.messages import UserError

logger = logging.getLogger(__name__)

OF_METRO = ("leave_unmasked_prob", "random_token_prob")
OF_T5 = ("empty_prob",)


@dataclass
@options_of(TaskOptions, without=(*OF_METRO, *OF_T5, "mask_multiple_length"))
class PretrainingConfig(FairseqDataclass):
    data: str = config_option(
        MISSING,
        "folder of metro prepare-text, or with dict.txt and binarised splits; several, joined by "
        "colons, or shards: one is read per epoch, in turn",
    )
    seed: int = II("common.seed")


class PretrainingTask(SentinelTask):
    """Base of the tasks `t5_metro` and `t5`."""

    is_metro: bool

    def __init__(self, cfg: PretrainingConfig, dictionary: Dictionary):
        super().__init__(cfg, dictionary)
        self.folders = shard_folders(cfg.data)
        check_shares(cfg, "mask_prob")
        if cfg.mask_multiple_length < 1:
            raise UserError(f"mask_multiple_length is {cfg.mask_multiple_length}; use 1 or more")

    @classmethod
    def setup_task(cls, cfg: PretrainingConfig, **kwargs):
        path = check_dictionaries(shard_folders(cfg.data))
        dictionary = load_dictionary(path)
        logger.info("dictionary: %s types", f"{len(dictionary):,}")
        return cls(cfg, dictionary)

    def has_sharded_data(self, split) -> bool:
        return len(self.folders) > 1

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Open one split, memory-mapped; with several shards, the one of this epoch."""
        folders = self.folders
        path = str(folders[(epoch - 1) % len(folders)] / split)
        # `combine` is what the trainer asks for where it trains. All shards are looked at then, so
        # that a bad one stops the run now and not epochs later.
        if split not in self.datasets:
            check_shards(folders if combine else [Path(path).parent], split)
        self.datasets[split] = FairseqPretrainingDataset(
            data_utils.load_indexed_dataset(path, self.dictionary, combine=combine),
            self.cfg,
            split,
            is_metro=self.is_metro,
            first_sentinel=self.first_sentinel,
            max_width=self.max_width,
            name=path,
        )
