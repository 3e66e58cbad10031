"""Task `t5_prompt_finetuning`: (prompt, answer) pairs of many tasks, each up to its cap.

Binarised as published, or kept as text (jsonl), which FLIPPED and CHANNEL need.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional  # fairseq reads Optional[...], not X | None

from fairseq.data import Dictionary, data_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import register_task
from omegaconf import II, MISSING

from fairseq_plugins.option import config_option
from fairseq_plugins.prompt_data import (
    BinarisedPrompts,
    PromptCollation,
    TextPrompts,
    is_text,
    task_names,
)
from fairseq_plugins.tasks._common import SentinelTask, load_dictionary
from metro.data.prompts.encoding import PromptEncoder
from metro.finetuning.data import BinarisedTasks, PromptData
from metro.models.vocabulary_folder import build_tokenizer
from metro.utils.checksums import refuse_damage
from metro.utils.messages import UserError

logger = logging.getLogger(__name__)


@dataclass
class T5PromptFinetuningConfig(FairseqDataclass):
    data: str = config_option(MISSING, "folder made by metro prepare-prompts")
    truncate_source: bool = config_option(
        False, "cut sources that are too long instead of refusing them"
    )
    truncate_target: bool = config_option(
        False, "cut targets that are too long instead of refusing them"
    )
    dataset_impl: Optional[str] = config_option(
        None, "of the published code, ignored: files say what they are"
    )
    tokens_per_sample: int = config_option(
        512, "longest source and target; also the number of sentinels"
    )
    max_source_tokens: Optional[int] = config_option(
        None, "longest source; default: tokens-per-sample"
    )
    max_target_tokens: Optional[int] = config_option(
        None, "longest target; default: tokens-per-sample"
    )
    vocab: Optional[str] = config_option(
        None,
        "folder with dict.txt and sp.model; default: the data folder. Needed where the "
        "data is text (jsonl)",
    )
    objective: str = config_option(
        "direct",
        "direct (answers to prompts) or channel (prompts to answers), where the data "
        "is text; the criterion flipped brings its own",
    )
    limit: Optional[int] = config_option(
        None, "at most so many examples per task, where the data is text"
    )
    seed: int = II("common.seed")


@register_task("t5_prompt_finetuning", dataclass=T5PromptFinetuningConfig)
class T5PromptFinetuningTask(SentinelTask):
    """Prompt finetuning. The decoder starts with `</s>`, as METRO-T0 does."""

    def __init__(self, cfg: T5PromptFinetuningConfig, dictionary: Dictionary):
        super().__init__(cfg, dictionary)
        for name in ("max_source_tokens", "max_target_tokens"):
            value = getattr(cfg, name)
            if value is not None and not 3 <= value <= cfg.tokens_per_sample:
                raise UserError(
                    f"{name} is {value}; use 3 to tokens_per_sample ({cfg.tokens_per_sample})"
                )
        if cfg.dataset_impl is not None:
            logger.warning("dataset_impl=%s is ignored: files say what they are", cfg.dataset_impl)
        if cfg.objective not in ("direct", "channel"):
            raise UserError(
                f"task.objective is {cfg.objective!r}; use direct or channel, or the criterion "
                "flipped"
            )
        self.objective = cfg.objective
        self.is_text = is_text(cfg.data)
        if cfg.objective == "channel" and not self.is_text:
            raise UserError(
                f"task.objective is channel but {cfg.data} is binarised; prepare it with "
                "metro prepare-prompts --format jsonl"
            )
        self.max_source = cfg.max_source_tokens or cfg.tokens_per_sample
        self.max_target = cfg.max_target_tokens or cfg.tokens_per_sample

    @classmethod
    def setup_task(cls, cfg: T5PromptFinetuningConfig, **kwargs):
        folder = cfg.vocab or cfg.data
        needed = ["dict.txt", "sp.model"] if is_text(cfg.data) else ["dict.txt"]
        for name in needed:
            if not os.path.exists(os.path.join(folder, name)):
                raise UserError(
                    f"no {name} in {folder}; give the folder of the model's vocabulary as "
                    "++task.vocab=DIR (--vocab DIR), or check task.data"
                )
        return cls(cfg, load_dictionary(Path(folder, "dict.txt")))

    def build_criterion(self, cfg):
        criterion = super().build_criterion(cfg)
        # Which ids an example has depends on the loss: flipped needs a wrong label as well.
        wanted = getattr(criterion, "objective", None)
        if wanted is not None:
            if not self.is_text:
                raise UserError(
                    f"the criterion {wanted} needs prompts kept as text, but {self.cfg.data} is "
                    "binarised; prepare it with metro prepare-prompts --format jsonl and give "
                    "--vocab DIR to fairseq-train"
                )
            self.objective = wanted
        return criterion

    @property
    def decoder_start(self) -> int:
        """The decoder's first input, for the model's configuration."""
        return self.dictionary.eos()

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Open the tasks of a split, memory-mapped."""
        refuse_damage(self.cfg.data)
        dataset = self._text(split) if self.is_text else self._binarised(split)
        dataset.set_epoch(epoch)
        self.datasets[split] = dataset
        logger.info("%s: %d examples of %s", split, len(dataset), self.cfg.data)

    def _text(self, split: str) -> TextPrompts:
        is_train = split == "train"
        tokenizer = build_tokenizer(
            self.cfg.vocab or self.cfg.data, len(self.dictionary), self.cfg.tokens_per_sample
        )
        data = PromptData(
            self.cfg.data,
            split,
            self.objective,
            PromptEncoder(
                tokenizer, max_source_length=self.max_source, max_target_length=self.max_target
            ),
            seed=self.cfg.seed,
            sampling=None if is_train else "capped",
            limit=self.cfg.limit,
            replace=is_train,
        )
        return TextPrompts(data, is_train=is_train, collation=self._collation(), seed=self.cfg.seed)

    def _binarised(self, split: str) -> BinarisedPrompts:
        folder = Path(self.cfg.data)
        names, caps = task_names(folder, split)
        kind = split.partition("_")[0]

        def load(name: str, side: str):
            prefix = folder / kind / name / f"{kind}.src-tgt.{side}"
            return data_utils.load_indexed_dataset(str(prefix), self.dictionary)

        tasks = BinarisedTasks(
            [load(name, "src") for name in names],
            [load(name, "tgt") for name in names],
            caps,
            max_source=self.max_source if self.cfg.truncate_source else None,
            max_target=self.max_target if self.cfg.truncate_target else None,
            bos=self.dictionary.bos(),
            eos=self.dictionary.eos(),
            vocab_size=self.first_sentinel,
            seed=self.cfg.seed,
            name=str(folder / kind),
        )
        return BinarisedPrompts(tasks, collation=self._collation(), seed=self.cfg.seed)

    def _collation(self) -> PromptCollation:
        return PromptCollation(self.dictionary.pad(), self.decoder_start, self.max_width)

    def max_positions(self) -> tuple[int, int]:
        return self.max_source, self.max_target
