"""One process of several (``torchrun``): the runs that a JSON file lists, one after the other.

With a number N, the second process is killed inside its N-th write of shards.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp

from metro.finetuning.run import finetune
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
for command, options in runs:
    {"pretrain": pretrain, "finetune": finetune}[command](progress=False, **options)
