"""`metro plan`: what it says fits, and the commands that it gives to copy."""

import shlex
from copy import copy

import pytest
import yaml

import metro
from metro.cli.main import load_command
from metro.finetuning.settings import FinetuningSettings
from metro.planning.memory import Batch, Training, training
from metro.planning.plan import CONTEXT, FRAGMENTED
from metro.planning.sizes import Sizes
from metro.pretraining.settings import PretrainingSettings
from metro.utils.messages import UserError


def options_of(command: str) -> dict:
    """The settings that the command line makes of a command."""
    words = shlex.split(command.replace("$(which metro)", "metro"))
    words = words[words.index("metro") + 1 :]
    found: dict = {}
    chosen = copy(load_command(words[0]))  # which others share
    chosen.callback = lambda **given: found.update(given)
    chosen.main(words[1:], standalone_mode=False)
    return {name: value for name, value in found.items() if value not in (None, (), [])}


def settings_of(command: str) -> FinetuningSettings | PretrainingSettings:
    """What the command trains with."""
    given = options_of(command)
    kind = PretrainingSettings if " pretrain " in command else FinetuningSettings
    return kind.combine(given.pop("config", None), given)


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
        {"finetune": "flipped_3b", "precision": "bf16", "gpus": 12, "objective": "direct"},
        {"finetune": "t0_3b", "precision": "fp32", "gpus": 12},
        {"pretrain": "metro_t5_base_8gpus", "precision": "fp32"},
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
        assert best.command in str(found)
        if purpose == "use":
            options_of(best.command)
            continue
        settings = settings_of(best.command)
        gpus = options.get("gpus", 1)
        assert settings.precision == options.get("precision", settings.precision)
        if purpose == "finetune":
            assert settings.batch_size <= best.most
            assert settings.objective == options.get("objective", settings.objective)
            wanted = Training(
                optimizer=settings.optimizer,
                checkpointing=settings.gradient_checkpointing,
                accumulates=settings.gradient_accumulation_steps > 1,
                lora_r=settings.lora_r * settings.lora,
                load_in=settings.load_in,
            )
            copies = 2 if settings.objective == "flipped" else 1
            lengths = settings.max_input_length, settings.max_target_length
            batch = Batch(copies * settings.batch_size, *lengths)
            sizes = Sizes.find(settings.model)
            how = wanted._replace(
                half=settings.precision != "fp32",
                shards=gpus if settings.fsdp else 1,
                replicas=1 if settings.fsdp else gpus,
                offload=settings.fsdp_offload,
            )
            assert training(sizes, batch, how) == best.memory
        else:
            assert settings.max_tokens <= best.most * settings.tokens_per_sample


@pytest.mark.parametrize(
    ("config", "own", "other"),
    [
        ({"finetune": "flipped_3b"}, "fp32", "bf16"),
        ({"finetune": "t0_3b"}, "bf16", "fp32"),
        ({"pretrain": "metro_t5_base_8gpus"}, "bf16", "fp32"),  # fp16, which takes as much
    ],
)
def test_precision_is_that_of_the_configuration_unless_it_is_given(config, own, other):
    def last(**options):
        return metro.plan(gpus=16, **config, **options).ways[-1]

    assert last().memory == last(precision=own).memory != last(precision=other).memory
    assert options_of(last(precision=other).command)["precision"] == other
    assert "--precision" not in last().command


@pytest.mark.parametrize(
    ("config", "changed", "fields"),
    [
        ("flipped_11b_lora", {"load_in": "8bit"}, {"load_in": "8bit", "lora_r": 16}),
        ("flipped_11b", {"fsdp": "full"}, {"shards": 16, "replicas": 1}),
        ("flipped_11b", {"fsdp": "hybrid"}, {"shards": 8, "replicas": 1}),
        (
            "flipped_11b",
            {"fsdp": "full", "fsdp_offload": True},
            {"shards": 16, "replicas": 1, "offload": True},
        ),
    ],
)
def test_what_a_configuration_does_already_is_in_every_way(tmp_path, config, changed, fields):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(FinetuningSettings.read(config) | changed))
    found = metro.plan(finetune=str(file), gpus=16)
    first, *others = (way for way in found.ways if way.purpose == "finetune")
    examples = settings_of(first.command).batch_size
    how = Training(checkpointing=True, replicas=16)._replace(accumulates=True, **fields)
    expected = training(Sizes.find("google/t5-v1_1-xxl"), Batch(2 * examples, 384, 64), how)
    assert first.options == "" and first.memory == expected
    for way in others:
        settings_of(way.command)  # none that exclude another
        assert "checkpointing" not in way.options and "--fsdp full" not in way.options


SIZES_OF_UPDATES = {
    **dict.fromkeys(("direct_3b", "channel_3b", "direct_ul_3b", "flipped_3b", "flipped_11b"), 240),
    **{"flipped_11b_lora": 240, "flipped_metro_large": 240, "t0_3b": 1024, "tiny": 32},
    **{"metro_t5_base_64gpus": 2048, "metro_t5_base_8gpus": 2048, "t5_base_8gpus": 2048},
    **{"t5_basepp_64gpus": 2048, "metro_t5_basepp_128gpus": 2048},
    **{"metro_t5_largepp_256gpus": 2048, "metro_t5_small": 16},
}
"""Examples, as the files' first lines and the papers have them."""


@pytest.mark.parametrize("gpus", [1, 8, 12])
@pytest.mark.parametrize("config", SIZES_OF_UPDATES)
def test_an_update_has_the_published_number_of_examples(config, gpus):
    """On as many GPUs as divide it; otherwise the nearest that is possible, which is said."""
    wanted = SIZES_OF_UPDATES[config]
    if config in PretrainingSettings.shipped():
        plan, purpose = metro.plan(pretrain=config, gpus=gpus), "pretrain"
    else:
        model = {} if "model" in FinetuningSettings.read(config) else {"model": "metro_t0_base"}
        plan, purpose = metro.plan(finetune=config, gpus=gpus, **model), "finetune"
    for way in plan.ways:
        if way.purpose != purpose:
            continue
        settings = settings_of(way.command)
        if purpose == "pretrain":
            micro = settings.max_tokens // settings.tokens_per_sample
            assert micro < settings.required_batch_size_multiple or not (
                micro % settings.required_batch_size_multiple
            )
            steps = settings.update_freq
        else:
            micro, steps = settings.batch_size, settings.gradient_accumulation_steps
        assert f"an update: {gpus} x {micro} x {steps} = {gpus * micro * steps} ex" in way.update
        assert abs(gpus * micro * steps - wanted) <= (0 if wanted % gpus == 0 else gpus / 2)
        assert ("nearest" in way.update) == (gpus * micro * steps != wanted)
    assert plan.best(purpose).update in str(plan)


def test_processes_are_as_many_as_gpus():
    given = metro.plan(model="t0_3b", gpus=12).best("finetune").command
    assert "--nnodes 2 --nproc_per_node 6 " in given


def test_host_memory_is_that_of_loading_and_of_offloaded_states():
    """11.1 B weights of 4 bytes in each of 8 processes: 356 GB; sharded, in the first: 45 GB."""
    weights = 4 * 11135332352
    found = metro.plan(model="flipped_11b", gpus=8, optimizer="adamw")
    host = {way.options: way.host for way in found.ways if way.purpose == "finetune"}
    assert host[""] == host["--lora"] == 8 * weights
    assert host["--fsdp full"] == weights
    assert host["--fsdp full --fsdp-offload"] == 5 * weights  # states, and the model to write
    assert host["--lora --load-in 4bit"] < weights
    assert all(text in str(found) for text in ("host GB", " 356 ", " 45 "))


def test_memory_grows_with_the_batch_and_shrinks_with_each_option():
    def totals(**options):
        found = metro.plan(model="t0_3b", gpus=8, **options)
        return {way.options: way.memory.total for way in found.ways if way.purpose == "finetune"}

    small, large = totals(batch_size=1, memory=1000), totals(batch_size=4, memory=1000)
    assert all(small[options] < large[options] for options in small)
    assert large["--fsdp full"] < large[""]
    assert large["--fsdp full --gradient-checkpointing"] < large["--fsdp full"]
    assert large["--lora --load-in 4bit"] < large["--lora"] < large[""]


def test_what_cannot_be_planned_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="give model .or finetune., or pretrain: one of the two"):
        metro.plan(gpus=8)
    with pytest.raises(UserError, match="no registered model of that name"):
        metro.plan(model="t0_12b")
    with pytest.raises(UserError, match="nor a configuration of that name"):
        metro.plan(pretrain="metro_t5_huge")
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(FinetuningSettings.read("t0_3b") | {"deepspeed": "zero.json"}))
    with pytest.raises(UserError, match="memory of deepspeed .zero.json. is not known: use fsdp"):
        metro.plan(finetune=str(own))
