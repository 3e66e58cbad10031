"""Writing checkpoints so that a killed run or a power cut leaves whole files."""

import atexit
import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_plugins.replaced import replaces
from metro.utils.files import flush
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
    if os.path.lexists(temporary):
        os.remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        flush(Path(temporary))
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


@replaces(checkpoint_utils, "verify_checkpoint_directory")
def lock_the_save_dir(original, save_dir):
    """Refuse a folder that another run writes into; called by the first process of a run.

    fairseq writes and removes a file "dummy" there, where two runs at once crash.
    """
    save_dir_lock.close()  # of an earlier run of this process
    if not PathManager.path_requires_pathmanager(save_dir):
        save_dir_lock.enter_context(locked(Path(save_dir), inside=True))
    original(save_dir)
