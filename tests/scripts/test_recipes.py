"""The shell recipes, with programs on PATH that write down how they were called."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
PLUGINS = "fairseq_plugins/configs/pretraining"
RECORD = 'printf "%s\\n" "$@" > "$CALLS/{name}"\nenv > "$CALLS/{name}.env"\n'


@pytest.fixture
def recipe(tmp_path):
    """`recipe(script, *arguments, **environment)` runs a script in an empty folder."""
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    calls.mkdir()
    for name in ("scripts", "fairseq_plugins"):
        (tmp_path / name).symlink_to(ROOT / name)

    def program(name: str, body: str) -> None:
        path = programs / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    program("torchrun", RECORD.format(name="torchrun") + 'exit "${STATUS:-0}"')
    program("fairseq-hydra-train", "exit 9")
    program("metro", "exit 9")
    program("python3", 'echo "${GPUS:-0}"')
    program("srun", RECORD.format(name="srun") + 'echo "$SAYS" >> "my job.log"\n"${@:2}"')
    program(
        "scontrol",
        r"""
        case "$1 $2" in
          "show hostnames") printf "node%s\n" 3 4;;
          "show job") printf "JobId=%s\n   StdErr=x\n   StdOut=$PWD/my job.log\n" "$3";;
          *) echo "$*" > "$CALLS/scontrol";;
        esac
        """,
    )

    def run(script: str, *arguments: str, **environment) -> subprocess.CompletedProcess:
        kept = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
        return subprocess.run(
            ["bash", f"scripts/{script}", *arguments],
            cwd=tmp_path,
            env={**kept, **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )

    run.calls = calls
    return run


def arguments(recipe, name: str) -> list[str]:
    return (recipe.calls / name).read_text().splitlines()


def environment(recipe, name: str) -> dict[str, str]:
    lines = (recipe.calls / f"{name}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def following(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_may_be_run(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("given", "processes", "threads"),
    [({}, "1", "1"), ({"GPUS": "4"}, "4", "8"), ({"GPUS": "4", "PROCESSES": "2"}, "2", "8")],
)
def test_torchrun_on_one_node(recipe, given, processes, threads):
    done = recipe("pretrain_torchrun.sh", "metro_t5_tiny", "a folder", "common.seed=2", **given)
    assert done.returncode == 0, done.stderr
    argv = arguments(recipe, "torchrun")
    assert following(argv, "--nnodes") == "1"
    assert following(argv, "--nproc_per_node") == processes
    assert following(argv, "--rdzv_endpoint") == "localhost:0"  # any free port
    program = next(i for i, part in enumerate(argv) if part.endswith("/fairseq-hydra-train"))
    config_dir, config_name = argv[program + 2], argv[program + 4]
    assert config_dir.endswith(PLUGINS) and (Path(config_dir) / f"{config_name}.yaml").exists()
    assert argv[-2:] == ["task.data=a folder", "common.seed=2"]
    assert environment(recipe, "torchrun")["OMP_NUM_THREADS"] == threads


def test_torchrun_without_fairseq(recipe):
    options = ["--output-dir", "runs/a run"]
    done = recipe("pretrain_torchrun.sh", "metro_t5_tiny", "a folder", *options, WITH="metro")
    assert done.returncode == 0, done.stderr
    argv = arguments(recipe, "torchrun")
    program = next(i for i, part in enumerate(argv) if part.endswith("/metro"))
    expected = ["pretrain", "--config", "metro_t5_tiny", "--data", "a folder", *options]
    assert argv[program + 1 :] == expected


def test_torchrun_on_several_nodes(recipe):
    nodes = {"NNODES": "4", "HEAD": "node0", "GPUS": "8", "RUN_ID": "5", "RESTARTS": "0"}
    recipe("pretrain_torchrun.sh", "metro_t5_base_64gpus", "/data", **nodes)
    argv = arguments(recipe, "torchrun")
    expected = "nnodes=4 nproc_per_node=8 rdzv_backend=c10d rdzv_endpoint=node0:29400 rdzv_id=5"
    for option, value in (pair.split("=") for pair in f"{expected} max-restarts=0".split()):
        assert following(argv, f"--{option}") == value


def test_workers_get_time_to_save(recipe):
    recipe("pretrain_torchrun.sh", "metro_t5_tiny", "/data")
    assert environment(recipe, "torchrun")["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "270"
    recipe("pretrain_torchrun.sh", "t5_tiny", "/data", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="900")
    assert environment(recipe, "torchrun")["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "900"


def test_this_torch_reads_the_time_to_save(monkeypatch):
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" not in LaunchConfig.__dataclass_fields__:
        pytest.skip("this torch always kills after 30 seconds; the recipe says so")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "270")
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    assert config.shutdown_timeout == 270


def test_missing_arguments_show_the_usage(recipe):
    done = recipe("pretrain_torchrun.sh", "metro_t5_tiny")
    assert done.returncode == 2 and "CONFIG DATA [OPTION=VALUE ...]" in done.stdout
    assert not (recipe.calls / "torchrun").exists()


JOB = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}


def test_slurm_starts_torchrun_once_per_node_and_meets_at_the_first(recipe):
    options = ("metro_t5_base_64gpus", "/data", "checkpoint.save_dir=runs/a")
    done = recipe("pretrain_slurm.sh", *options, **JOB, GPUS="8", SAYS="done training")
    assert done.returncode == 0, done.stderr
    argv = arguments(recipe, "srun")
    assert argv == ["--kill-on-bad-exit=1", "scripts/pretrain_torchrun.sh", *options]
    argv = arguments(recipe, "torchrun")
    assert following(argv, "--nnodes") == "2" and following(argv, "--nproc_per_node") == "8"
    assert following(argv, "--rdzv_endpoint") == "node3:29477"
    assert following(argv, "--rdzv_id") == "77"
    assert argv[-2:] == ["task.data=/data", "checkpoint.save_dir=runs/a"]
    assert not (recipe.calls / "scontrol").exists()


@pytest.mark.parametrize(
    ("says", "queued"),
    [("stopped after update 9; the same command resumes here", True), ("out of memory", False)],
)
def test_slurm_queues_a_stopped_job_again_but_not_a_failed_one(recipe, says, queued):
    done = recipe("pretrain_slurm.sh", "t5_tiny", "/data", **JOB, SAYS=says, STATUS="3")
    assert done.returncode == 3
    assert (recipe.calls / "scontrol").exists() == queued
    if queued:
        assert arguments(recipe, "scontrol") == ["requeue 77"]


def test_slurm_sends_the_signal_before_torchrun_would_kill(recipe):
    """Oracle: the time that torchrun itself is given, and the directives sbatch reads."""
    recipe("pretrain_torchrun.sh", "t5_tiny", "/data", GPUS="1")
    timeout = environment(recipe, "torchrun")["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    slurm = (ROOT / "scripts/pretrain_slurm.sh").read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", slurm, re.M))
    name, _, before_the_end = directives["signal"].partition("@")
    assert name == "TERM" and int(before_the_end) > int(timeout)
    assert directives["ntasks-per-node"] == "1"
