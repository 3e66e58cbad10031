"""Loading checkpoints: without executing code, despite a damaged one, with an error's reason."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import re
import textwrap
import zipfile
from pathlib import Path

import omegaconf
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.data.iterators import EpochBatchIterator
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from fairseq_plugins.compat.writing import link_or_copy
from fairseq_plugins.replaced import replaces
from metro.models.reading import allowed_classes, explain_refusal
from metro.utils.checksums import check_archive
from metro.utils.messages import UserError

logger = logging.getLogger(__name__)

# `torch.load(weights_only=True)`, the default since torch 2.6, refuses fairseq's own objects: a
# checkpoint's `cfg` is an omegaconf tree once it is in memory (and is sent to the other ranks so,
# large tensors as placeholders); those of the original hold an `argparse.Namespace`. Anything else
# in a file is still refused, and nothing is loaded with weights_only=False.
torch.serialization.add_safe_globals([*allowed_classes(), distributed_utils._TensorPlaceholder])

resuming_from: str | None = None
"""The checkpoint_last.pt that a run is resuming from just now."""
DAMAGE = re.compile("PytorchStreamReader|unexpected EOF|wrong (byte )?size|corrupt file")
MISMATCH = re.compile(r"Error\(s\) in loading state_dict")


@replaces(checkpoint_utils, "load_checkpoint_to_cpu")
def fall_back_from_damaged_checkpoints(original, path, *args, **kwargs) -> dict:
    """Load the newest complete checkpoint beside a damaged checkpoint_last.pt in its place.

    fairseq ends with EOFError although there are complete checkpoints in the folder. Only where a
    run resumes automatically: a file that the user named is that file or an error.
    """

    def load(file) -> dict:
        try:
            if zipfile.is_zipfile(file):
                check_archive(file)
            return correct_depth(original(file, *args, **kwargs))
        except pickle.UnpicklingError as error:
            raise UserError(explain_refusal(Path(file), error)) from error

    try:
        return load(path)
    except Exception as error:
        if not os.path.isfile(path) or not is_damage(path, error):
            raise
        folder, name = os.path.split(path)
        for other in newest_checkpoints(folder, besides=name) if path == resuming_from else ():
            try:
                state = load(other)
            except Exception as other_error:
                if is_damage(other, other_error):
                    continue
                raise
            logger.error(
                "%s IS DAMAGED (%s: %s). CONTINUING FROM %s INSTEAD; remove the damaged file if "
                "this is not what you want.",
                path,
                type(error).__name__,
                str(error).partition("\n")[0],
                other,
            )
            return state
        reason = str(error).partition("\n")[0]
        others = " and no other checkpoint in its folder can be loaded; remove it to start again"
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {reason})"
            f"{others if path == resuming_from else ': copy it again'}"
        ) from error


@replaces(checkpoint_utils, "load_checkpoint")
def restore_missing_last_checkpoint(original, cfg, trainer, **kwargs):
    """Resume from the newest checkpoint where checkpoint_last.pt is missing.

    fairseq starts again then, even beside complete checkpoints. That happens when a run dies
    between writing its first checkpoint and copying it to checkpoint_last.pt.
    """
    global resuming_from
    name = f"checkpoint_last{trainer.checkpoint_suffix}.pt"
    last = os.path.join(cfg.save_dir, name)
    resumes = cfg.restore_file == "checkpoint_last.pt" and not cfg.no_last_checkpoints
    if resumes:
        if trainer.data_parallel_rank == 0 and not os.path.exists(last):
            for newest in newest_checkpoints(cfg.save_dir, besides=name)[:1]:
                logger.error("%s IS MISSING. CONTINUING FROM %s.", last, newest)
                link_or_copy(newest, last)
        if dist.is_available() and dist.is_initialized():
            dist.barrier(distributed_utils.get_global_group())
    resuming_from = last if resumes else None
    try:
        return original(cfg, trainer, **kwargs)
    finally:
        resuming_from = None


@replaces(Trainer, "load_checkpoint")
def show_the_reason(original, self, filename, *args, **kwargs):
    """Raise the reason, where fairseq says "please ensure that the architectures match"."""
    try:
        return original(self, filename, *args, **kwargs)
    except Exception as error:
        reason = error.__context__
        if isinstance(reason, ValueError):
            raise reason from None
        if isinstance(reason, RuntimeError) and MISMATCH.match(str(reason)):
            raise UserError(explain_mismatch(filename, str(reason))) from None
        raise


@replaces(distributed_utils, "_broadcast_object_slow")
def broadcast_without_arbitrary_pickle(original, obj, src_rank, group, dist_device):
    """Receive objects with weights_only=True said aloud, whatever the default is."""
    is_source = distributed_utils.get_rank(group) == src_rank
    buffer = io.BytesIO()
    if is_source:
        torch.save(obj, buffer)
    length = torch.tensor([buffer.getbuffer().nbytes], device=dist_device)
    distributed_utils.broadcast(length, src=src_rank, group=group)
    if is_source:
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(dist_device)
    else:
        data = torch.empty(int(length), dtype=torch.uint8, device=dist_device)
    distributed_utils.broadcast(data, src=src_rank, group=group)
    if is_source:
        return obj
    received = io.BytesIO(data.cpu().numpy().tobytes())
    return torch.load(received, map_location="cpu", weights_only=True)


@replaces(EpochBatchIterator, "state_dict")
def note_length_of_epoch(original, self) -> dict:
    """Save how many batches this process has in the epoch, for a resume with another number."""
    return {**original(self), "num_batches": len(self)}


@replaces(EpochBatchIterator, "load_state_dict")
def resume_at_the_proportional_place(original, self, state_dict: dict) -> None:
    """Resume behind the same share of the epoch where the number of batches is another.

    It is where the number of processes or the batch size is. fairseq would skip the same number
    of batches, and end where there are fewer.
    """
    done, before, now = state_dict["iterations_in_epoch"], state_dict.get("num_batches"), len(self)
    if before and before != now and done:
        place = done * now // before
        logger.warning(
            "resuming epoch %d behind batch %d of %d of each process: the checkpoint was behind %d "
            "of %d, with another number of processes or batch size",
            state_dict["epoch"], place, now, done, before,
        )  # fmt: skip
        state_dict = {**state_dict, "iterations_in_epoch": place, "num_batches": now}
    elif done >= now > 0:
        raise UserError(
            f"the checkpoint is behind batch {done} of epoch {state_dict['epoch']}, and each "
            f"process has {now} now: use the earlier number of processes and batch size, or begin "
            "the epoch again with checkpoint.reset_dataloader=true (--reset-dataloader)"
        )
    original(self, state_dict)


def is_damage(path: str, error: Exception) -> bool:
    """Return whether a file failed to load because it is cut or blank.

    Not where memory ran out or a class was refused: another file would then only hide the reason.
    """
    with open(path, "rb") as file:
        if not any(file.read(512)):  # empty, or zeros as after a power cut
            return True
    if isinstance(error, OSError):
        return error.errno in (errno.EIO, errno.EINVAL)
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return DAMAGE.search(str(error)) is not None
    return isinstance(error, EOFError | zipfile.BadZipFile)


def explain_mismatch(path: str, error: str) -> str:
    """Word torch's complaint about weights that do not fit the model as one line."""
    _, first, *others = error.splitlines()
    more = f" (and {len(others)} more like it)" if others else ""
    return (
        f"{path} does not fit the model: {textwrap.shorten(first, 300).rstrip('. ')}{more}. Give "
        "the architecture and the sizes that it was trained with (encoder_embed_dim, "
        "encoder_layers, encoder_attention_heads, max_positions, ...)"
    )


def newest_checkpoints(folder: str, besides: str) -> list[str]:
    """List the complete checkpoints of a folder, newest first.

    crash.pt is not one: it holds an update that failed.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    paths = [
        os.path.join(folder, name)
        for name in names
        if re.fullmatch(r"checkpoint.*\.pt", name) and name != besides
    ]
    return sorted(paths, key=os.path.getmtime, reverse=True)


def correct_depth(state: dict) -> dict:
    """Read the encoder's depth from the weights of an original METRO checkpoint.

    Those state the generator's depth as `encoder_layers`.
    """
    model_cfg = (state.get("cfg") or {}).get("model")
    name = getattr(model_cfg, "_name", None) or getattr(model_cfg, "arch", None) or ""
    names = [re.match(r"encoder\.layers\.(\d+)\.", key) for key in state.get("model", {})]
    depths = {int(match[1]) + 1 for match in names if match}
    if model_cfg is not None and str(name).startswith("t5_metro") and depths:
        if isinstance(model_cfg, omegaconf.DictConfig):
            omegaconf.OmegaConf.set_struct(model_cfg, False)
        model_cfg.encoder_layers = max(depths)
    return state
