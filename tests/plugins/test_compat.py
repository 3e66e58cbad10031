"""The repairs of fairseq that the training tests do not reach."""

import argparse
import errno
import os
import pickle

import pytest
import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf
from torch.utils.data import Subset

from fairseq_plugins.compat.loading import correct_depth, is_damage, newest_checkpoints
from fairseq_plugins.compat.writing import link_or_copy
from metro.models.reading import load_tensors_and_settings
from metro.utils.messages import UserError
from tests.plugins.conftest import METRO, TINY, configure

TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.fixture
def training(corpus, monkeypatch):
    """Distributed options of a plain command line; no launcher in the environment."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_")) or name in {*TORCHRUN, "LOCAL_RANK"}:
            monkeypatch.delenv(name)
    return configure(corpus, *TINY, *METRO)


def test_torchrun_is_joined(training, monkeypatch):
    for name, value in {**TORCHRUN, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    cfg = training.distributed_training
    distributed_utils.infer_init_method(cfg)
    assert (cfg.distributed_world_size, cfg.distributed_rank, cfg.device_id) == (2, 1, 1)
    assert cfg.distributed_init_method == "env://" and cfg.distributed_no_spawn


def test_torchrun_with_another_world_size_is_refused(training, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    training.distributed_training.distributed_world_size = 4
    with pytest.raises(ValueError, match="world_size is 4 but torchrun started 2 .*leave"):
        distributed_utils.infer_init_method(training.distributed_training)


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_separate_copies_on_a_cluster_are_refused(training, monkeypatch, variable):
    """One GPU per node: fairseq's world size is 1 and every node would train its own model."""
    monkeypatch.setenv(variable, "16")
    with pytest.raises(ValueError, match=f"16 processes .{variable}.*Start torchrun once per node"):
        distributed_utils.infer_init_method(training.distributed_training)


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize(
    ("variable", "launcher", "port"),
    [
        ("SLURM_STEP_NUM_TASKS", "Slurm", -1),
        ("OMPI_COMM_WORLD_SIZE", "mpirun", -1),
        ("OMPI_COMM_WORLD_SIZE", "mpirun", 12345),  # fairseq knows Slurm only
    ],
)
def test_separate_copies_on_machines_with_gpus_are_refused(
    training, monkeypatch, variable, launcher, port, gpus
):
    """fairseq's world size is then the number of local GPUs, and each task spawns as many."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv(variable, "2")
    cfg = training.distributed_training
    cfg.distributed_world_size, cfg.distributed_port = gpus, port
    with pytest.raises(ValueError, match=f"{launcher} started 2 .*is {gpus} .*Start torchrun once"):
        distributed_utils.infer_init_method(cfg)


@pytest.fixture
def slurm(training, monkeypatch):
    """Two nodes of four GPUs, one task per GPU; returns the distributed options of task 5."""
    names = {"STEP_NUM_TASKS": 8, "NTASKS": 8, "NNODES": 2, "PROCID": 5, "LOCALID": 1, "NODEID": 1}
    for name, value in {**names, "STEP_NODELIST": "a[1-2]", "JOB_ID": 7}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(distributed_utils.subprocess, "check_output", lambda _: b"a1\na2\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    training.distributed_training.distributed_port = 12345
    return training.distributed_training


def test_slurm_tasks_with_a_port_are_joined_by_fairseq_itself(slurm):
    slurm.distributed_world_size = 8
    distributed_utils.infer_init_method(slurm)
    assert slurm.distributed_init_method == "tcp://a1:12345" and slurm.distributed_no_spawn
    assert (slurm.distributed_rank, slurm.device_id) == (5, 1)


@pytest.mark.parametrize(("port", "world"), [(-1, 8), (-1, 4), (12345, 1)])
def test_slurm_tasks_that_fairseq_cannot_join_are_refused(slurm, port, world):
    slurm.distributed_port, slurm.distributed_world_size = port, world
    with pytest.raises(ValueError, match=f"Slurm started 8 .*is {world} .*port {port}: each would"):
        distributed_utils.infer_init_method(slurm)


def test_a_world_size_that_does_not_fit_slurm_names_the_remedy(slurm):
    """fairseq's default, the local GPUs: its message is the assertion "4, 4, 2"."""
    slurm.distributed_world_size = 4
    with pytest.raises(ValueError, match="4 GPUs here, 2 Slurm nodes, 8 Slurm tasks. Start torch"):
        distributed_utils.infer_init_method(slurm)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("init_method", [None, "tcp://localhost:12345"])
def test_spawning_without_gpus_is_refused(training, init_method):
    """With an init method fairseq spawned no process, trained nothing and returned 0."""
    training.distributed_training.distributed_world_size = 2
    training.distributed_training.distributed_init_method = init_method
    with pytest.raises(ValueError, match="shows no GPU.*torchrun --nproc_per_node 2"):
        distributed_utils.call_main(training, lambda cfg: pytest.fail("started"))


def test_alone_means_alone(training):
    distributed_utils.infer_init_method(training.distributed_training)
    assert training.distributed_training.distributed_init_method is None
    assert training.distributed_training.distributed_world_size == 1


def test_configurations_can_be_read_from_checkpoints_without_executing_code(tmp_path):
    """Also after METRO's own loader, whose allowance is temporary, has read such a file."""
    tree = OmegaConf.create({"a": [1, 2.5, None, True], "b": {"c": "text", "d": "${a}"}})
    saved = {"cfg": tree, "args": argparse.Namespace(lr=[0.1], arch="t5_metro")}
    path = tmp_path / "checkpoint.pt"
    torch.save(saved, path)
    for load in (load_tensors_and_settings, lambda path: torch.load(path, weights_only=True)):
        loaded = load(path)
        assert loaded["cfg"] == tree and loaded["args"] == saved["args"]


@pytest.mark.parametrize("kind", [OmegaConf.create, lambda values: argparse.Namespace(**values)])
def test_the_depth_of_an_original_metro_checkpoint_is_read_from_its_weights(kind):
    cfg = kind({"_name": "t5_metro_base_rpe", "encoder_layers": 4})
    weights = {f"encoder.layers.{i}.fc1.bias": None for i in range(12)}
    state = correct_depth({"cfg": {"model": cfg}, "model": weights})
    assert state["cfg"]["model"].encoder_layers == 12
    other = {
        "cfg": {"model": kind({"_name": "transformer", "encoder_layers": 4})},
        "model": weights,
    }
    assert correct_depth(other)["cfg"]["model"].encoder_layers == 4


def test_a_copy_is_complete_or_absent_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    (tmp_path / "a.pt").write_bytes(b"new")
    (tmp_path / "b.pt").write_bytes(b"old")
    (tmp_path / "b.pt.tmp").write_bytes(b"left by a killed run")
    monkeypatch.setattr(os, "link", no_links)
    link_or_copy(str(tmp_path / "a.pt"), str(tmp_path / "b.pt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    assert (tmp_path / "b.pt").read_bytes() == b"new"
    (tmp_path / "a.pt").write_bytes(b"x")
    assert (tmp_path / "b.pt").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("content", "error", "expected"),
    [
        (b"", EOFError(), True),
        (bytes(600), RuntimeError("Cannot use weights_only=True with the legacy .tar"), True),
        (b"PK", OSError(errno.EINVAL, "Invalid argument"), True),
        (b"PK", OSError(errno.EIO, "I/O error"), True),
        (b"PK", PermissionError(errno.EACCES, "Permission denied"), False),
        (b"PK", RuntimeError("PytorchStreamReader failed reading file data/0"), True),
        (b"PK", RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (b"PK", torch.OutOfMemoryError("CUDA out of memory"), False),
        (b"PK", MemoryError(), False),
        (b"PK", pickle.UnpicklingError("Unsupported class posix.mkdir"), False),
        (b"PK", KeyError("cfg"), False),
    ],
)
def test_only_damage_counts_as_damage(tmp_path, content, error, expected):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    assert is_damage(str(path), error) is expected


def test_crash_files_are_never_resumed_from(tmp_path):
    for name in ("crash.pt", "checkpoint_last.pt", "checkpoint_1_2.pt.tmp", "checkpoint_1_2.pt"):
        (tmp_path / name).write_bytes(b"")
    found = newest_checkpoints(str(tmp_path), besides="checkpoint_last.pt")
    assert [os.path.basename(path) for path in found] == ["checkpoint_1_2.pt"]


def test_another_number_of_processes_resumes_at_the_proportional_place(caplog):
    """Oracle: by hand, 15 of 20 batches are 7 of 10 on each of two processes."""

    def iterator(num_shards: int) -> EpochBatchIterator:
        batches = [[number] for number in range(20)]
        return EpochBatchIterator(
            Subset(range(20), range(20)), lambda items: items, batches, num_shards=num_shards
        )

    one = iterator(1)
    epoch = one.next_epoch_itr(shuffle=False)
    for _ in range(15):
        next(epoch)
    state = one.state_dict()
    two = iterator(2)
    two.load_state_dict(state)
    assert [item for [item] in two.next_epoch_itr(shuffle=False)] == [14, 16, 18]
    assert "behind batch 7 of 10 of each process" in caplog.text
    same = iterator(1)
    same.load_state_dict(state)
    assert [item for [item] in same.next_epoch_itr(shuffle=False)] == [15, 16, 17, 18, 19]
    del state["num_batches"]  # a checkpoint of an earlier version
    with pytest.raises(UserError, match="behind batch 15 of epoch 1, .*reset_dataloader"):
        iterator(2).load_state_dict(state)
