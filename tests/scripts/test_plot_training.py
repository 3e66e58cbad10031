"""Curves from a training log: every way fairseq writes it, interruptions, and a picture."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

from metro.pretraining.metrics import summarized

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_training.py"
sys.path.insert(0, str(SCRIPT.parent))
from plot_training import Curve, draw, limits, panels, read_log, reference_lines  # noqa: E402


def train(update: int, value: float) -> str:
    stats = {"epoch": 1, "num_updates": str(update), "lr": "0.1"}
    losses = ("loss", "generator_loss", "discriminator_loss", "rtd_loss")
    return json.dumps(stats | {name: str(value) for name in losses})


def valid(update: int, value: float) -> str:
    stats = {"epoch": 1, "valid_num_updates": str(update), "valid_best_loss": "oops"}
    return json.dumps(stats | {"valid_generator_loss": str(value)})


LINES = [
    "2026-01-01 00:00:00 | INFO | fairseq_cli.train | task: {'not': json, 'num_updates': 3}",
    f"2026-01-01 00:00:01 | INFO | train_inner | {train(10, 4.0)}",
    f"[2026-01-01 00:00:02,000][train_inner][INFO] - {train(20, 3.0)}",
    f"[2026-01-01 00:00:03,000][valid][INFO] - {valid(20, 3.5)}",
    json.dumps({"epoch": 1, "train_num_updates": "20", "train_generator_loss": "9.0"}),
    train(20, 3.0),  # fairseq repeats lines in its log file
    train(30, 2.5),
    train(20, 2.9),  # a run resumed from update 10
    '{"epoch": 1, "num_updates": "4',  # cut off
]


def test_every_form_of_a_line_is_read_and_the_last_word_on_an_update_counts(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n".join(LINES))
    curves = read_log(log)
    assert curves["train"]["generator_loss"] == Curve([10, 20, 30], [4.0, 2.9, 2.5])
    assert curves["valid"]["generator_loss"] == Curve([20], [3.5])
    assert "best_loss" not in curves["valid"]


def test_dashed_lines_are_the_logged_references_of_the_losses_they_compare_with(tmp_path):
    """The main model's, which sees most of the tokens, gets none."""
    entropy = {"num_updates": "30", "rtd_label_entropy": "0.6"}
    references = {
        "valid_num_updates": "30",
        "valid_unigram_bits": "8.9",
        "valid_bigram_bits": "6.7",
    }
    log = tmp_path / "log"
    log.write_text(
        "\n".join([train(10, 4.0), train(30, 2.5), *map(json.dumps, (entropy, references))])
    )
    curves = read_log(log)
    across = [10, 30]
    expected = {"unigram": Curve(across, [8.9, 8.9]), "bigram": Curve(across, [6.7, 6.7])}
    assert reference_lines(curves, "generator_loss") == expected
    assert reference_lines(curves, "discriminator_loss") == {}
    assert list(panels(curves)) == ["generator_loss", "discriminator_loss", "rtd_loss"]
    assert reference_lines(curves, "rtd_loss") == {"guessing by frequency": Curve([30], [0.6])}
    draw(curves, tmp_path / "losses.png")


def test_the_axis_leaves_out_the_first_fall():
    """Oracle: by hand; 10 of 100 updates, and a margin of a tenth."""
    train = Curve([1, 9, 10, 50, 100], [12.0, 9.0, 4.0, 3.0, 2.0])
    assert limits([train, Curve([1, 100], [1.0, 1.0])]) == (0.7, 4.3)
    assert limits([Curve([5], [2.0])]) == (1.9, 2.1)


def test_picture_is_drawn(tmp_path):
    (tmp_path / "log").write_text("\n".join(LINES))
    argv = [sys.executable, SCRIPT, tmp_path / "log", tmp_path / "losses.png"]
    subprocess.run(argv, check=True, capture_output=True)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_of_t5_is_drawn(tmp_path, monkeypatch):
    """Oracle: by hand; the metrics of two updates and a validation, under the names that are
    logged, as `metro pretrain` saves them. No line is dashed; the axis holds the validation."""
    history = []
    for step, bits in ((10, 9.0), (20, 7.0)):
        sums = {"loss": bits * math.log(2) * 5, "nll_loss": bits * math.log(2) * 5}
        logged = summarized({**sums, "n_correct": 1, "sample_size": 5})
        history.append({**logged, "grad_norm": 1.0, "step": step})
    history.append({"valid_loss": 6.0, "valid_nll_loss": 6.0, "step": 20})
    (tmp_path / "checkpoint-20").mkdir()
    state = json.dumps({"log_history": history})
    (tmp_path / "checkpoint-20/trainer_state.json").write_text(state)
    curves = read_log(tmp_path)
    assert list(panels(curves)) == ["nll_loss"]
    assert curves["train"]["nll_loss"] == Curve([10, 20], [9.0, 7.0])
    assert curves["valid"]["nll_loss"] == Curve([20], [6.0])
    assert reference_lines(curves, "nll_loss") == {}
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: None)
        draw(curves, tmp_path / "losses.png")
    [axis] = pyplot.gcf().axes
    pyplot.close()
    assert len(axis.lines) == 2 and axis.get_ylim() == pytest.approx((5.7, 9.3))
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_log_without_losses_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "log").write_text("nothing\n")
    with pytest.raises(ValueError, match="log_format=json"):
        draw(read_log(tmp_path / "log"), tmp_path / "losses.png")
