"""Writing checkpoints so that a killed run or a power cut leaves whole files."""

import logging
import os
import shutil
from pathlib import Path

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_plugins.replaced import replaces
from metro.utils.files import flush

logger = logging.getLogger(__name__)


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
def verify_without_race(original, save_dir):
    """Let several processes create and remove the file "dummy"; the slower one crashed."""
    try:
        original(save_dir)
    except FileNotFoundError:
        logger.info("another process removed the test file in %s first", save_dir)
