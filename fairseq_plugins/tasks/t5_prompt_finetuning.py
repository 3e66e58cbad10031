"""Task `t5_prompt_finetuning`: (prompt, answer) pairs of many tasks, each up to its cap."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional  # fairseq reads Optional[...], not X | None

from fairseq.data import Dictionary, data_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import register_task
from omegaconf import II, MISSING

from fairseq_plugins.prompt_data import BinarisedPrompts, task_names
from fairseq_plugins.tasks._common import SentinelTask
from metro.finetuning.collation import EncodedPrompt, collate_prompts

logger = logging.getLogger(__name__)


@dataclass
class T5PromptFinetuningConfig(FairseqDataclass):
    data: str = field(default=MISSING, metadata={"help": "folder made by metro prepare-prompts"})
    truncate_source: bool = field(
        default=False, metadata={"help": "cut sources that are too long instead of refusing them"}
    )
    truncate_target: bool = field(
        default=False, metadata={"help": "cut targets that are too long instead of refusing them"}
    )
    dataset_impl: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "of the published code, ignored: files say what they are"}
    )
    tokens_per_sample: int = field(
        default=512,
        metadata={"help": "longest source and target; also the number of sentinels"},
    )
    max_source_tokens: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "longest source; default: tokens-per-sample"}
    )
    max_target_tokens: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "longest target; default: tokens-per-sample"}
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
                raise ValueError(
                    f"{name} is {value}; use 3 to tokens_per_sample ({cfg.tokens_per_sample})"
                )
        if cfg.dataset_impl is not None:
            logger.warning("dataset_impl=%s is ignored: files say what they are", cfg.dataset_impl)
        self.max_source = cfg.max_source_tokens or cfg.tokens_per_sample
        self.max_target = cfg.max_target_tokens or cfg.tokens_per_sample

    @classmethod
    def setup_task(cls, cfg: T5PromptFinetuningConfig, **kwargs):
        path = os.path.join(cfg.data, "dict.txt")
        if not os.path.exists(path):
            raise ValueError(
                f"no dict.txt in {cfg.data}; it is written by metro prepare-prompts --vocab: check "
                "task.data, or copy the dict.txt that the data was binarised with"
            )
        return cls(cfg, Dictionary.load(path))

    @property
    def decoder_start(self) -> int:
        """The decoder's first input, for the model's configuration."""
        return self.dictionary.eos()

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Open the tasks of a split, memory-mapped."""
        folder = Path(self.cfg.data)
        names, caps = task_names(folder, split)
        kind = split.partition("_")[0]

        def load(name: str, side: str):
            prefix = folder / kind / name / f"{kind}.src-tgt.{side}"
            return data_utils.load_indexed_dataset(str(prefix), self.dictionary)

        self.datasets[split] = BinarisedPrompts(
            [load(name, "src") for name in names],
            [load(name, "tgt") for name in names],
            caps,
            max_source=self.max_source if self.cfg.truncate_source else None,
            max_target=self.max_target if self.cfg.truncate_target else None,
            bos=self.dictionary.bos(),
            eos=self.dictionary.eos(),
            num_words=self.first_sentinel,
            name=str(folder / kind),
            collate=self.collate,
            seed=self.cfg.seed,
        )
        self.datasets[split].set_epoch(epoch)
        logger.info("%s: %d tasks, %d examples", split, len(names), len(self.datasets[split]))

    def collate(self, examples: list[EncodedPrompt]) -> dict:
        dictionary = self.dictionary
        batch = collate_prompts(examples, dictionary.pad(), self.decoder_start, self.max_width)
        return {
            "id": batch.indices,
            "nsentences": len(examples),
            "ntokens": batch.num_target_tokens,
            "net_input": {
                "src_tokens": batch.source_ids,
                "src_lengths": batch.lengths,
                "prev_output_tokens": batch.decoder_input_ids,
                "has_padding": batch.has_padding,
            },
            "target": batch.target_ids,
        }

    def max_positions(self) -> tuple[int, int]:
        return self.max_source, self.max_target
