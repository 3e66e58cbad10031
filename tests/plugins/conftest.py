"""Fixtures of the plugin tests: a tiny binarised corpus, fairseq's commands as users run them."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, need_fairseq

NUM_WORDS = 96


class Plugins(pytest.Module):
    """A module of this folder: what it imports imports fairseq."""

    def collect(self):
        need_fairseq()
        return super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Plugins:
    return Plugins.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Random documents of random words, in fairseq's format: dict.txt, train and valid."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_documents=60)
    return folder


def write_corpus(folder: Path, num_documents: int) -> None:
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder, data_file_path

    folder.mkdir(exist_ok=True)
    words = ["[MASK]", *(f"w{i}" for i in range(NUM_WORDS - 1))]
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    random = np.random.default_rng(0)
    for split, documents in (("train", num_documents), ("valid", 12)):
        prefix = str(folder / split)
        builder = MMapIndexedDatasetBuilder(data_file_path(prefix), dtype=np.uint16)
        import torch

        for _ in range(documents):
            for _ in range(random.integers(1, 5)):
                ids = 4 + np.sort(random.integers(1, NUM_WORDS, random.integers(2, 30)))
                builder.add_item(torch.tensor([*ids, 2]))
            builder.add_item(torch.tensor([2]))
        builder.finalize(prefix + ".idx")


TINY = [
    f"--user-dir {ROOT / 'fairseq_plugins'} --encoder-embed-dim 16 --encoder-ffn-embed-dim 32",
    "--encoder-layers 1 --encoder-attention-heads 2 --max-positions 64",
    "--tokens-per-sample 32 --sample-break-mode complete_doc --shorten-method random_crop",
    "--shorten-data-split-list train --skip-invalid-size-inputs-valid-test --max-tokens 256",
    "--optimizer adam --adam-betas (0.9,0.98) --adam-eps 1e-6 --weight-decay 0.01 --lr 0.003",
    "--lr-scheduler polynomial_decay --warmup-updates 2 --total-num-update 40 --clip-norm 2.0",
    "--no-epoch-checkpoints --seed 1 --log-format json --log-interval 1 --num-workers 0 --cpu",
]
METRO = ["--task t5_metro --arch t5_metro_base_rpe --criterion t5_metro --generator-layers 1"]
T5 = [
    "--task t5 --arch transformer_t5_base_rpe --criterion label_smoothed_cross_entropy",
    "--report-accuracy",
]
NO_DROPOUT = "--dropout 0 --attention-dropout 0"


def configure(data: Path, *arguments: str):
    """A configuration as fairseq-train makes it of its command line."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_plugins  # noqa: F401

    parts = [part for argument in arguments for part in argument.split()]
    args = options.parse_args_and_arch(options.get_training_parser(), [str(data), *parts])
    return convert_namespace_to_omegaconf(args)


@pytest.fixture
def run_here(caplog):
    """fairseq-train of a configuration inside this process; returns what it logged."""
    import fairseq_cli.train
    from fairseq import checkpoint_utils

    def run_configuration(cfg) -> "Result":
        for function in (checkpoint_utils.save_checkpoint, fairseq_cli.train.should_stop_early):
            vars(getattr(function, "__wrapped__", function)).pop("best", None)
        caplog.clear()
        with caplog.at_level("INFO"):
            fairseq_cli.train.main(cfg)
        records = caplog.get_records("call")
        return Result(0, "\n".join(f"| {r.name} | {r.getMessage()}" for r in records))

    return run_configuration


@pytest.fixture
def train(corpus, run_here):
    """Training of a tiny model: `train(save, *options, kind=METRO, data=corpus)`."""

    def run_tiny(save, *arguments, kind=METRO, data=corpus) -> "Result":
        return run_here(configure(data, *TINY, *kind, f"--save-dir {save}", *arguments))

    return run_tiny


@dataclasses.dataclass
class Result:
    """A finished run."""

    code: int
    text: str

    def logged(self, tag: str) -> list[dict]:
        """The JSON lines with this tag: train_inner, train, valid."""
        lines = [line for line in self.text.splitlines() if f"| {tag} | {{" in line]
        return [json.loads(line.split(f"| {tag} | ", 1)[1]) for line in lines]


def environment(folder: Path = ROOT) -> dict:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "TORCHELASTIC", "WORLD_SIZE", "RANK"))
    }
    path = str(folder)
    if folder == ROOT:
        path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start(
    name: str,
    *options: str,
    processes: int = 0,
    session: bool = False,
    folder: Path = ROOT,
    most_bytes: int | None = None,
) -> subprocess.Popen:
    """Start one of fairseq's commands, under torchrun where `processes` is given.

    It runs in `folder` and imports from there. With `session` it leads a process group of its own;
    its files cannot become larger than `most_bytes`.
    """
    program = [sys.executable, str(Path(sys.executable).parent / name)]
    if processes:
        torchrun = "-m torch.distributed.run --rdzv_backend c10d --rdzv_endpoint localhost:0"
        program = [sys.executable, *torchrun.split(), f"--nproc_per_node={processes}", program[1]]
    limits = (most_bytes, most_bytes)
    return subprocess.Popen(
        program + [part for option in options for part in option.split()],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=session,
        preexec_fn=most_bytes and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)),
    )


def run(name: str, *options: str, code: int | None = 0, **how) -> Result:
    process = start(name, *options, **how)
    text = process.communicate(timeout=240)[0]
    assert code is None or process.returncode == code, text[-6000:]
    return Result(process.returncode, text)


def load(path: Path) -> dict:
    """A checkpoint, read without executing anything."""
    import torch

    return torch.load(path, weights_only=True)


def assert_equal_runs(one: dict, other: dict) -> None:
    """Weights and Adam state are equal bit for bit."""
    import torch

    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    states = [checkpoint["last_optimizer_state"]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name]))
