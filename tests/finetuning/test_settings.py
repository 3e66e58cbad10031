"""Options from files and command line: what is given is what the run has."""

import pytest

from metro.finetuning.settings import FinetuningSettings

NEEDED = {"model": "m", "data": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlikelihood_weight": -1}, "unlikelihood_weight is -1.0; use 0 or more"),
        ({"unlikelihood_weight": float("nan")}, "unlikelihood_weight is nan"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"adam_betas": [0.9]}, "give two"),
        ({"dropout": 1.0}, "use 0 up to less than 1"),
        ({"learning_rate": 0}, "use more than 0"),
        ({"lora_r": 4}, "lora_r is 4, but nothing trains adapters"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0.0; use more than 0"),
        ({"max_steps": 0}, "use 1 or more, or -1"),
        ({"objective": "flipped", "label_smoothing": 0.1}, "which flipped does not have"),
        ({"seed": None}, "seed is empty"),
        ({"seed": -1}, "seed is -1; use 0 or more"),
        ({"eval_steps": -1}, "eval_steps is -1.0; use 0 or more"),
        ({"eval_steps": float("nan")}, "eval_steps is nan; use a finite number"),
        ({"save_steps": 1.5}, "save_steps is 1.5; use a whole number"),
        ({"save_total_limit": -3}, "save_total_limit is -3; use 0 or more"),
        ({"adam_epsilon": -1}, "adam_epsilon is -1.0; use 0 or more"),
        ({"adam_betas": [0.9, 1]}, "adam_betas is .*; use 0 up to less than 1"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; use a finite number"),
        ({"limit": True}, "limit is True; it must be of type int"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuningSettings(**NEEDED, **options)


@pytest.mark.parametrize("name", FinetuningSettings.shipped())
def test_every_shipped_configuration_is_complete(name):
    """All but output_dir; tiny and own_rows also want a model and data."""
    settings = FinetuningSettings.combine(
        name, {"output_dir": "o", **(NEEDED if name in ("tiny", "own_rows") else {})}
    )
    assert settings.max_steps is None if name == "own_rows" else settings.max_steps > 0


def test_published_facts_of_the_configurations():
    """What the papers state: examples an update on so many GPUs, lengths, rates, clipping."""
    facts = {
        "flipped_3b": (12, 240, 512, 128, 5e-5, 0.5, "flipped", "google/t5-v1_1-xl"),
        "flipped_11b": (12, 240, 384, 64, 5e-5, 0.5, "flipped", "google/t5-v1_1-xxl"),
        "direct_3b": (12, 240, 512, 128, 1e-4, 0.5, "direct", "google/t5-xl-lm-adapt"),
        "channel_3b": (12, 240, 128, 512, 1e-4, 0.5, "channel", "google/t5-xl-lm-adapt"),
        "direct_ul_3b": (12, 240, 512, 128, 1e-4, 0.5, "direct+ul", "google/t5-xl-lm-adapt"),
        "t0_3b": (8, 1024, 512, 256, 1e-3, 1.0, "direct", "google/t5-xl-lm-adapt"),
    }
    for name, (gpus, examples, source, target, rate, clip, objective, model) in facts.items():
        found = FinetuningSettings.combine(name, {"output_dir": "o"})
        assert found.batch_size * found.gradient_accumulation_steps * gpus == examples, name
        assert (found.max_input_length, found.max_target_length) == (source, target), name
        assert (found.learning_rate, found.max_grad_norm, found.dropout) == (rate, clip, 0.1)
        assert (found.objective, found.model, found.optimizer) == (objective, model, "adafactor")
        assert found.max_steps == (12200 if name == "t0_3b" else 5000)
        assert found.unlikelihood_weight == 3 and found.lr_scheduler == "constant"


def test_an_unknown_configuration_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no file flipped_4b, .*; METRO has .*flipped_3b"):
        FinetuningSettings.combine("flipped_4b", {})
