"""What a finetuning run says while it works: one line per logging step."""

from __future__ import annotations

import time

from transformers import TrainerCallback

SHOWN = (
    "loss", "likelihood", "unlikelihood", "right_prob", "wrong_prob", "ranked_right",
    "exact_match", "grad_norm", "learning_rate", "padding_share", "skipped_examples",
    "eval_loss", "eval_ranked_right", "eval_exact_match", "eval_skipped_examples",
)  # fmt: skip


class ConsoleCallback(TrainerCallback):
    """Prints update, time left and the numbers that matter."""

    def __init__(self):
        self.started = self.first_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            place = f"from update {state.global_step} " if state.global_step else ""
            print(f"training {place}to update {state.max_steps}", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.started is None:
            return
        numbers = [f"{name} {_short(logs[name])}" for name in SHOWN if name in (logs or {})]
        if not numbers:
            return
        done = state.global_step - self.first_step
        seconds = time.monotonic() - self.started
        left = seconds / done * (state.max_steps - state.global_step) if done else 0
        clock = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        print(
            f"update {state.global_step}/{state.max_steps} (left {clock})  {'  '.join(numbers)}",
            flush=True,
        )


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
