"""Writing checkpoints so that a killed run or a power cut leaves whole files."""

import atexit
import logging
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_plugins.replaced import replaces
from metro.utils.files import flush, link, naming
from metro.utils.locks import locked

logger = logging.getLogger(__name__)
save_dir_lock = ExitStack()
atexit.register(save_dir_lock.close)


def link_or_copy(source: str, target: str) -> None:
    """Make `target` the same file as `source`: at every moment it is the old one or the new one.

    A hard link costs no second write; checkpoints are never changed in place. Where the file system
    has no links, a copy is completed under another name first.
    """
    temporary = f"{target}.tmp"
    with naming(Path(target), Path(temporary)):
        link(Path(source), Path(temporary))
        os.replace(temporary, target)
    flush(Path(target).absolute().parent)


@replaces(PathManager, "copy")
def copy_atomically(original, src_path, dst_path, overwrite=False):
    """Replace checkpoint_last.pt whole.

    fairseq copies over it: killed there, it leaves a truncated file.
    """
    if PathManager.path_requires_pathmanager(dst_path):
        return original(src_path, dst_path, overwrite)
    link_or_copy(src_path, dst_path)
    return True


@replaces(PathManager, "rename")
def rename_durably(original, src, dst):
    """Write a file to the disk before it gets its name.

    fairseq renames the first file of a save without fsync: a power cut can leave it empty.
    """
    flush(Path(src))
    original(src, dst)
    flush(Path(dst).absolute().parent)


@replaces(checkpoint_utils, "torch_persistent_save")
def save_or_leave_nothing(original, obj, filename, async_write=False):
    """Name the checkpoint that cannot be written, and remove what there is of it."""
    try:
        with naming(Path(filename), Path(f"{filename}.tmp")):
            original(obj, filename, async_write)
    except Exception:
        Path(f"{filename}.tmp").unlink(missing_ok=True)
        raise


@replaces(checkpoint_utils, "_torch_persistent_save")
def save_once(original, obj, f):
    """Write a checkpoint once.

    fairseq writes it three times into the same open file, one behind the other, waiting 5 seconds
    in all, and logs a traceback; what the second time writes cannot be read.
    """
    torch.save(obj, f)


@replaces(checkpoint_utils, "verify_checkpoint_directory")
def lock_the_save_dir(original, save_dir):
    """Refuse a folder that another run writes into; called by the first process of a run.

    fairseq writes and removes a file "dummy" there, where two runs at once crash.
    """
    save_dir_lock.close()  # of an earlier run of this process
    if not PathManager.path_requires_pathmanager(save_dir):
        save_dir_lock.enter_context(locked(Path(save_dir), inside=True))
    original(save_dir)
