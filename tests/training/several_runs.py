"""One process of several (``torchrun``): the runs that a JSON file lists, one after the other.

With a number N, the second process is killed inside its N-th write of shards.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from metro.finetuning.run import finetune
from metro.finetuning.validation import ValidationRows
from metro.training import sharding
from metro.training.pretrain import pretrain

_, file, *kill_at = sys.argv
runs = json.loads(Path(file).read_text())
if any(options.get("deepspeed") for _, options in runs):
    import deepspeed
    from accelerate.state import DistributedType, PartialState

    deepspeed.ops.__compatible_ops__.clear()  # whose kernels would be compiled first
    # Without a GPU accelerate would not join the processes for DeepSpeed, which works there.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
if kill_at and os.environ["RANK"] == "1":
    write, saves = dcp.FileSystemWriter.write_data, []

    def write_and_die(*args):
        saves.append(write(*args))
        if len(saves) == int(kill_at[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return saves[-1]

    dcp.FileSystemWriter.write_data = write_and_die
if os.environ["RANK"] == "0":
    make_folder = Path.mkdir

    def make_late(path, *args, **kwargs):
        """Be the last to go on with a checkpoint: the others have to wait."""
        if path.name.startswith("checkpoint-"):
            time.sleep(0.3)
        make_folder(path, *args, **kwargs)

    Path.mkdir = make_late
else:
    find_blocks, shard_part = sharding.blocks, sharding.fully_shard

    def blocks_checked(model):
        """Of the weights only those that are being sharded may be here as a whole."""

        def shard_checked(part, **options):
            whole = [p for p in model.parameters() if not p.is_meta and not isinstance(p, DTensor)]
            assert {*map(id, whole)} == {*map(id, part.parameters())} - {*map(id, sharded)}
            shard_part(part, **options)
            sharded.extend(part.parameters())

        sharded: list = []
        sharding.fully_shard = shard_checked
        return find_blocks(model)

    sharding.blocks = blocks_checked
    # as if numbers were rounded otherwise; all of them are to do what the first one says
    accuracy = ValidationRows.accuracy
    ValidationRows.accuracy = lambda *args: 1 - accuracy(*args)
if of_node := os.environ.get("PROCESSES_OF_NODE"):
    os.environ["LOCAL_WORLD_SIZE"] = of_node
for command, options in runs:
    {"pretrain": pretrain, "finetune": finetune}[command](progress=False, **options)
