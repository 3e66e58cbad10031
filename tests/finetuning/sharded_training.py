"""One process of several (``torchrun``): losses and gradients of a sharded model; saves it.

Run as ``sharded_training.py WHAT VOCABULARY OUT``; WHAT is sharded: ``blocks`` or ``everything``.
Oracle: the same model in one piece.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from metro.conversion.export import export_model
from metro.finetuning.losses import LossOptions, batch_loss
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from tests.finetuning.conftest import small_model

what, vocabulary, out = sys.argv[1:]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
source = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]])
target, wrong = torch.tensor([[9, 10, 2], [11, 2, 1]]), torch.tensor([[12, 2], [13, 2]])


def sharded(model):
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            fully_shard(block, mesh=mesh)
        if what == "everything":
            fully_shard(stack.pos_embed, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=what == "everything")


for objective in ("direct", "channel", "flipped", "direct+ul"):
    plain, parts = small_model("metro"), sharded(small_model("metro"))
    options = LossOptions(objective, 1)
    losses = [batch_loss(model, options, source, target, wrong) for model in (plain, parts)]
    for loss in losses:
        loss.total.backward()
    torch.testing.assert_close(losses[1].total, losses[0].total)
    for (name, whole), part in zip(plain.named_parameters(), parts.parameters(), strict=True):
        found = part.grad.full_tensor()
        torch.testing.assert_close(found, whole.grad, atol=1e-5, rtol=1e-4, msg=name)

tokenizer = MetroT5Tokenizer(f"{vocabulary}/sp.model", f"{vocabulary}/dict.txt")
parts = sharded(small_model("metro"))
export_model(parts, tokenizer, f"{out}/exported")
state = get_model_state_dict(
    parts, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
)
if dist.get_rank() == 0:
    parts.save_pretrained(f"{out}/saved", state_dict=state)
dist.destroy_process_group()
