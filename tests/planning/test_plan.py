"""`metro plan`: what it says fits, and the commands that it gives to copy."""

import shlex

import pytest

import metro
from metro.cli.main import load_command
from metro.finetuning.settings import FinetuningSettings
from metro.planning.plan import CONTEXT, FRAGMENTED
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import UserError


def options_of(command: str) -> dict:
    """The settings that the command line makes of a command."""
    words = shlex.split(command.replace("$(which metro)", "metro"))
    words = words[words.index("metro") + 1 :]
    found: dict = {}
    chosen = load_command(words[0])
    chosen.callback = lambda **given: found.update(given)
    chosen.main(words[1:], standalone_mode=False)
    return {name: value for name, value in found.items() if value not in (None, (), [])}


def test_an_11b_model_is_sharded_on_eight_gpus_and_gets_adapters_on_one():
    """By hand: 11.1 B weights and gradients of 4 bytes are 89 GB; an eighth of both 11 GB."""
    eight, one = (metro.plan(model="flipped_11b", gpus=n, memory=80) for n in (8, 1))
    whole = next(way for way in eight.ways if way.purpose == "finetune" and not way.options)
    assert whole.memory.weights == whole.memory.gradients == 4 * 11135332352 and not whole.fits
    best = eight.best("finetune")
    assert best.options == "--fsdp full"  # the configuration flipped_11b checkpoints already
    assert best.memory.weights + best.memory.gradients == pytest.approx(89.1e9 / 8, rel=0.01)
    assert one.best("finetune").options == "--lora" and one.best("use").options == ""
    assert "--fsdp" not in str(one)
    assert metro.plan(finetune="flipped_11b_lora").best("finetune").most >= 8
    assert metro.plan(model="flipped_11b", memory=8).best("finetune") is None
    assert "nothing fits: more GPUs, or larger ones" in str(metro.plan(model="t0_11b", memory=8))


@pytest.mark.parametrize(
    "options",
    [
        {"model": "flipped_11b", "gpus": 8},
        {"model": "t0_3b", "memory": 24, "optimizer": "adamw", "batch_size": 4},
        {"finetune": "flipped_3b", "gpus": 16, "memory": 40},
        {"pretrain": "metro_t5_largepp_256gpus", "gpus": 8, "memory": 16, "vocabulary": 64000},
    ],
)
def test_the_first_way_that_fits_is_a_command_of_that_memory(options):
    """The command's own options, planned again, take what was said."""
    found = metro.plan(**options)
    usable = options.get("memory", 80) * 1e9 * (1 - FRAGMENTED) - CONTEXT
    assert all(way.fits == (0 < way.memory.total <= usable) for way in found.ways)
    for purpose in {way.purpose for way in found.ways}:
        best = found.best(purpose)
        given = options_of(best.command)
        assert best.command in str(found)
        if purpose == "finetune":
            config = given.pop("config", None)
            settings = FinetuningSettings.combine(config, given)
            assert settings.batch_size <= best.most
            updated = settings.batch_size * settings.gradient_accumulation_steps
            base = FinetuningSettings.combine(
                config, {"model": "m", "data": "d", "output_dir": "o"}
            )
            wanted = options.get("batch_size", base.batch_size) * base.gradient_accumulation_steps
            assert wanted <= updated < wanted + settings.batch_size
        elif purpose == "pretrain":
            settings = PretrainingSettings.combine(given.pop("config"), given)
            assert settings.max_tokens <= best.most * settings.tokens_per_sample


def test_memory_grows_with_the_batch_and_shrinks_with_each_option():
    def totals(**options):
        found = metro.plan(model="t0_3b", gpus=8, **options)
        return {way.options: way.memory.total for way in found.ways if way.purpose == "finetune"}

    small, large = totals(batch_size=1, memory=1000), totals(batch_size=4, memory=1000)
    assert all(small[options] < large[options] for options in small)
    assert large["--fsdp full"] < large[""]
    assert large["--fsdp full --gradient-checkpointing"] < large["--fsdp full"]
    assert large["--lora --load-in 4bit"] < large["--lora"] < large[""]


def test_what_cannot_be_planned_is_refused_in_one_line():
    with pytest.raises(UserError, match="give model .or finetune., or pretrain: one of the two"):
        metro.plan(gpus=8)
    with pytest.raises(UserError, match="no registered model of that name"):
        metro.plan(model="t0_12b")
    with pytest.raises(UserError, match="nor a configuration of that name"):
        metro.plan(pretrain="metro_t5_huge")
