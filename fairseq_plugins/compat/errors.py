"""Errors that a user can correct: one line, as in METRO's own commands."""

import logging
import os
import sys

from hydra._internal import utils as hydra_utils

from fairseq_plugins.replaced import replaces
from metro.utils.messages import one_line


def is_for_users(error: BaseException | None) -> bool:
    """Tell errors of which the traceback says nothing more; METRO_DEBUG=1 shows it all the same."""
    if not isinstance(error, Exception) or os.environ.get("METRO_DEBUG"):
        return False
    return one_line(error) is not None


@replaces(sys, "excepthook")
def print_one_line(original, kind, error, trace):
    if is_for_users(error):
        sys.stderr.write(f"error: {one_line(error)}\n")
    else:
        original(kind, error, trace)


@replaces(hydra_utils, "is_under_debugger")
def let_them_pass(original):
    """Keep fairseq-hydra-train from printing their traceback: hydra raises what a debugger sees."""
    return is_for_users(sys.exc_info()[1]) or original()


@replaces(logging.Handler, "handleError")
def go_on_without_a_log(original, handler, record):
    """Log no more where the disk is full; else every line would be followed by a traceback."""
    if not isinstance(sys.exc_info()[1], OSError):
        original(handler, record)
