"""Stopping a run of the Trainer after the current micro-batch; it resumes as if it had not been."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from metro.training.output_folder import TRAINER_STATE
from metro.utils.stopping import Stop


class StopCallback(TrainerCallback):
    """Saves a checkpoint and ends the training once it is asked to.

    Several processes stop after an update, which tells them of each other's requests; a process
    that runs alone also within one, whose micro-batches it does again when it resumes.
    """

    def __init__(self, stop: Stop):
        self.stop = stop

    def on_train_begin(self, args, state, control, **kwargs):
        self.random_states = random_states()

    def on_step_end(self, args, state, control, **kwargs):
        self.random_states = random_states()
        if self.stop.agreed or (args.world_size == 1 and self.stop.requested_here):
            self.save_and_stop(args, state, control)

    def on_substep_end(self, args, state, control, **kwargs):
        if args.world_size == 1 and self.stop.requested_here:
            restore(self.random_states)
            self.save_and_stop(args, state, control)

    def save_and_stop(self, args, state, control) -> None:
        saved = Path(args.output_dir, f"checkpoint-{state.global_step}", TRAINER_STATE).is_file()
        control.should_training_stop = True
        control.should_save = state.global_step > 0 and not saved
        control.should_evaluate = False


class Patience(EarlyStoppingCallback):
    """Ends the training after some evaluations that were no better, and leaves a note of it."""

    def on_train_end(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()


def random_states() -> tuple:
    """Return the states of all generators that a checkpoint holds."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def restore(states: tuple) -> None:
    """Set the generators to earlier states."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
