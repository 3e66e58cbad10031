"""Runs whose weights are shared among processes: two on the CPU, of tiny models."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

import metro
from metro.cli.convert import command as convert
from metro.pretraining.settings import PretrainingSettings
from metro.sharding import SHARDS, ShardingSettings
from metro.training.arguments import backend
from metro.training.output_folder import TRAINER_STATE, complete_checkpoints
from metro.training.sharding import made_once, shard
from metro.utils.files import read_json
from metro.utils.messages import UserError
from tests.finetuning.prepared import write_prepared
from tests.processes import run_python
from tests.training.tiny import TINY, assert_same, losses

pytest.importorskip("accelerate")
from metro.training.pretrain import pretrain, training_arguments  # noqa: E402

ONE_AFTER_ANOTHER = Path(__file__).with_name("several_runs.py")
QUICK = {
    "metro": dict(update_freq=2, clip_norm=2.0, checkpoint_activations=True),
    "flipped": dict(objective="flipped", lora=True, optimizer="sgd", gradient_accumulation_steps=2),
}
SLOW = {
    "t5": dict(task="t5", bf16=True),
    "direct": dict(objective="direct", optimizer="adamw", weight_decay=0.1),
    "direct+ul": dict(objective="direct+ul", optimizer="sgd", gradient_checkpointing=True),
    "channel": dict(objective="channel", optimizer="adafactor", early_stopping=3),
    "rounded": dict(objective="direct", optimizer="sgd", precision="bf16"),
}
ROUNDED = {"t5": 1e-3, "rounded": 2**-7}
"""In bf16, and how near losses are: pretraining's are means over more tokens."""
CASES = QUICK | SLOW
"""Of each objective, with optimizers, and ways to save memory, between them."""
EXACT = dict(dropout=0.0, attention_dropout=0.0, seed=3)
CLOSE = dict(rtol=1e-4, atol=2e-6)
"""For weights after sums over processes, and norms of parts, in another order."""


def in_processes(number: int, folder: Path, runs: list, *kill_at: int, **options) -> None:
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {number}".split()
    run_python(*torchrun, ONE_AFTER_ANOTHER, folder / "runs.json", *kill_at, **options)


in_two_processes = functools.partial(in_processes, 2)


@pytest.fixture(scope="module")
def options(pretraining_data, t5_folder, exported, tmp_path_factory):
    """`options(name, **more)`: command and options of a run that saves after 2 of 4 updates."""
    folder = tmp_path_factory.mktemp("sharded")
    prompts = write_prepared(folder / "prompts", 25)
    pretraining = dict(TINY, data=pretraining_data, max_update=4, save_interval_updates=2)
    common = dict(data=prompts, batch_size=4, max_steps=4, save_steps=2, eval_steps=2)
    common |= dict(
        learning_rate=1e-2, logging_steps=1, use_cpu=True, report_to="none", batching="random"
    )

    def make(name: str, case: str, **more) -> tuple[str, dict]:
        own = CASES[case]
        is_pretraining = "objective" not in own
        base = pretraining if is_pretraining else common
        if not is_pretraining:
            is_t5 = case in ("direct", "channel", "rounded")
            base = dict(base, model=t5_folder if is_t5 else exported("metro_tiny_a"))
        chosen = {**base, **own, **more, "output_dir": folder / name}
        return "pretrain" if is_pretraining else "finetune", chosen

    make.folder = folder
    return make


@pytest.fixture(scope="module")
def runs(options):
    """The folder with the runs of two processes: CASE, "CASE sharded", and others."""
    alone = options("one-two", "metro", **EXACT, fsdp="full", max_update=2)[1]
    pretrain(progress=False, **{**alone, "update_freq": 4})
    in_two_processes(
        options.folder,
        [
            *(options(case, case) for case in QUICK),
            *(options(f"{case} sharded", case, fsdp="full") for case in QUICK),
            options("exact", "metro", **EXACT),
            options("one-two", "metro", **EXACT, fsdp="full"),
            options("two-one", "metro", **EXACT, fsdp="full", max_update=2),
        ],
    )
    return options.folder


def check_same_run(one: Path, other: Path, rel: float = 1e-5) -> None:
    """Losses agree, the same numbers are logged, and as many answers are right."""
    found, expected = (read_json(run / TRAINER_STATE)["log_history"] for run in (other, one))
    assert losses(other) == pytest.approx(losses(one), rel=rel) and losses(one)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    if rel < 1e-4:
        right, as_many = ([line.get("eval_accuracy") for line in log] for log in (found, expected))
        assert right == as_many


@pytest.mark.parametrize("case", QUICK)
def test_a_sharded_run_is_the_unsharded_one(runs, case):
    """With dropout."""
    check_same_run(runs / case, runs / f"{case} sharded")
    assert_same(runs / case, runs / f"{case} sharded", **CLOSE)


@pytest.mark.slow
def test_sharded_runs_are_the_unsharded_ones(runs, options):
    """As above. In bf16 sharded weights are rounded before they are used: losses are near."""
    in_two_processes(
        options.folder,
        [
            *(options(case, case) for case in SLOW),
            *(options(f"{case} sharded", case, fsdp="full") for case in SLOW),
            options("offloaded", "metro", fsdp="full", fsdp_offload=True),
        ],
    )
    for case in SLOW:
        rel = ROUNDED.get(case, 1e-5)
        check_same_run(runs / case, runs / f"{case} sharded", rel=rel)
        if case not in ROUNDED:
            assert_same(runs / case, runs / f"{case} sharded", **CLOSE)
    assert_same(runs / "metro sharded", runs / "offloaded", **CLOSE)


@pytest.mark.parametrize("fsdp", ["full", None])
def test_one_process_goes_on_with_the_shards_of_two(runs, options, tmp_path, fsdp):
    """With sharding and without. Oracle: two processes, unsharded, that were left alone."""
    shutil.copytree(runs / "two-one", tmp_path / "two-one")
    chosen = options("two-one", "metro", **EXACT, fsdp=fsdp, update_freq=4)[1]
    result = pretrain(progress=False, **{**chosen, "output_dir": tmp_path / "two-one"})
    check_same_run(runs / "exact", result.folder)
    assert_same(runs / "exact", result.folder, **CLOSE)


def test_two_processes_go_on_with_the_shards_of_one(runs):
    check_same_run(runs / "exact", runs / "one-two")
    assert_same(runs / "exact", runs / "one-two", **CLOSE)


@pytest.mark.parametrize("case", QUICK)
def test_an_interrupted_runs_shards_become_a_model(runs, case, tmp_path):
    """Oracle: the finished model, of the same weights; an adapter is merged."""
    checkpoint = complete_checkpoints(runs / f"{case} sharded")[-1]
    command = ["to-hf", str(checkpoint), "--out", str(tmp_path / "joined")]
    done = CliRunner().invoke(convert, command)
    assert done.exit_code == 0 and "joined" in done.output, done.output
    finished = runs / f"{case} sharded"
    if case == "flipped":
        command = ["to-hf", str(finished), "--out", str(tmp_path / "merged")]
        assert CliRunner().invoke(convert, command).exit_code == 0
        finished = tmp_path / "merged"
    assert_same(finished, tmp_path / "joined")


def test_what_cannot_be_joined_or_loaded_is_one_line(runs, tmp_path):
    checkpoint = complete_checkpoints(runs / "metro sharded")[-1]
    command = ["to-hf", str(tmp_path / "copy"), "--out", str(tmp_path / "out")]
    shutil.copytree(checkpoint, tmp_path / "copy")
    done = CliRunner().invoke(convert, command)
    assert "has neither pretrain.yaml nor finetune.yaml" in str(done.exception)
    with pytest.raises(UserError, match="holds the parts of several processes: join them first"):
        metro.load(checkpoint)
    part = sorted((tmp_path / "copy" / SHARDS).glob("__1_*"))[0]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    done = CliRunner().invoke(convert, command)
    assert f"{part} was damaged" in str(done.exception)
    (tmp_path / "copy" / TRAINER_STATE).unlink()
    assert "is not complete" in str(CliRunner().invoke(convert, command).exception)


@pytest.mark.slow
def test_two_nodes_with_a_copy_each_are_the_unsharded_run(runs, options):
    """Four processes, of which two are a node. Oracle: two processes, unsharded."""
    nodes = options("nodes", "metro", **EXACT, fsdp="hybrid", update_freq=1)
    in_processes(4, options.folder, [nodes], env={"PROCESSES_OF_NODE": "2"})
    check_same_run(runs / "exact", runs / "nodes")
    assert_same(runs / "exact", runs / "nodes", **CLOSE)


@pytest.mark.parametrize("of_node", [None, "2"])
def test_nodes_that_are_not_known_are_one_line(monkeypatch, of_node):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="fsdp hybrid .* LOCAL_WORLD_SIZE is"):
            args = SimpleNamespace(bf16=False, fp16=False, device=torch.device("cpu"))
            shard(torch.nn.Linear(1, 1), ShardingSettings(fsdp="hybrid"), args)
    finally:
        dist.destroy_process_group()


def test_one_process_alone_describes_its_model_to_none():
    """Oracle: a model that cannot be pickled."""
    model = torch.nn.Linear(1, 1)
    model.activation = lambda x: x
    args = SimpleNamespace(process_index=0, world_size=1, device=torch.device("cpu"))
    assert made_once(lambda: model, ShardingSettings(fsdp="full"), args) is model


def test_processes_exchange_tensors_of_both_memories_and_wait_for_hours(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert backend(True, cuda=True) == "cuda:nccl,cpu:gloo"
    assert {backend(False, cuda=True), backend(True, cuda=False)} == {None}
    monkeypatch.delenv("LOCAL_RANK")
    assert backend(True, cuda=True) is None
    chosen = PretrainingSettings.of(data="data", output_dir=tmp_path, cpu=True).resolved()
    assert training_arguments(chosen).ddp_timeout == 6 * 3600


@pytest.mark.slow
def test_deepspeed_trains_and_resumes_as_unsharded_runs(runs, options):
    """ZeRO-3, with the optimizers of each command."""
    pytest.importorskip("deepspeed")
    file = options.folder / "deepspeed.json"
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings["stage3_gather_16bit_weights_on_model_save"] = True
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    auto = {name: "auto" for name in names}
    auto |= {"zero_optimization": settings, "zero_allow_untested_optimizer": True}
    file.write_text(json.dumps(auto))
    zero = options("zero", "metro", **EXACT, deepspeed=file)
    flipped = options("zero flipped", "flipped", deepspeed=file)
    in_two_processes(options.folder, [(zero[0], {**zero[1], "max_update": 2}), flipped])
    in_two_processes(options.folder, [zero])
    check_same_run(runs / "exact", runs / "zero")
    assert_same(runs / "exact", runs / "zero", **CLOSE)
    assert_same(runs / "flipped", runs / "zero flipped", **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["metro", "flipped"])
def test_a_run_killed_while_it_writes_shards_goes_on_from_those_before(runs, options, case):
    """A process dies with its parts written. Oracle: the run that was left alone."""
    run = options(f"{case} killed", case, fsdp="full")
    in_two_processes(options.folder, [run], 2, code=None)
    folder = run[1]["output_dir"]
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-2"]
    assert (folder / "checkpoint-4" / SHARDS).is_dir()
    in_two_processes(options.folder, [run])
    assert_same(runs / f"{case} sharded", folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": "full", "deepspeed": "x.json"}, "both shard the model: give one"),
        ({"fsdp_offload": True}, "fsdp_offload is an option of fsdp"),
        ({"fsdp": "half"}, "use one of full, hybrid"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        PretrainingSettings.of(data="data", output_dir="out", **given)
