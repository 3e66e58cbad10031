"""Values that depend on the model and on the number of rows, where the user gives none."""

import math
from pathlib import Path

from metro.data.prompts.stored import read_manifest
from metro.finetuning.settings import FinetuningSettings
from metro.models.projection import width_of

RATE_TIMES_WIDTH, LORA_RATE = 0.1, 3
PASSES, LEAST_UPDATES = 10, 200


def default_updates(folder: Path, settings: FinetuningSettings, num_processes: int) -> int:
    """Choose a number of updates: some passes over the training examples, and not too few.

    Tried on 16 to 2,000 rows (docs/finetuning.md).
    """
    tasks = read_manifest(folder)["splits"]["train"].values()
    num_examples = sum(facts["num_examples"] for facts in tasks)
    of_update = settings.batch_size * settings.gradient_accumulation_steps * num_processes
    return max(LEAST_UPDATES, math.ceil(PASSES * num_examples / of_update))


def default_rate(model, settings: FinetuningSettings) -> float:
    """Choose a learning rate of AdamW: less for wider models, more for adapters.

    Tried on a T5 of width 128 (docs/finetuning.md). Of width 768 it is 1.3e-4, where METRO-T0
    base took 1e-4, and of 2048 it is 5e-5, as FLIPPED-3B took.
    """
    return RATE_TIMES_WIDTH / width_of(model) * (LORA_RATE if settings.lora else 1)
