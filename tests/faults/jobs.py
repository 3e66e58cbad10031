"""What is killed: each command, when it is at work, what must never be lost, when it is right."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.data.prepared import random_text
from tests.data.prompts.toys import make_world
from tests.finetuning.prepared import write_prepared, write_t5

UPDATES = 20
TINY = (
    "--task t5_metro --arch t5_metro_base_rpe --generator-layers 1 --encoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --encoder-layers 1 --encoder-attention-heads 2 --max-positions 64 "
    "--tokens-per-sample 32 --sample-break-mode complete_doc --shorten-method random_crop "
    "--shorten-data-split-list train --max-tokens 256 --adam-eps 1e-6 --adam-betas (0.9,0.98) "
    "--lr 0.003 --lr-scheduler polynomial_decay --warmup-updates 2 --total-num-update 40 "
    "--clip-norm 2.0 --seed 1 --log-interval 1 --num-workers 0 --cpu --max-update {updates} "
    "--save-interval-updates 3 --update-freq 2 --keep-interval-updates 2 "
    "--validate-interval-updates 9"
)
FAIRSEQ = (
    f"fairseq-train {{data}} {TINY} --criterion t5_metro --user-dir {ROOT}/fairseq_plugins "
    "--skip-invalid-size-inputs-valid-test --optimizer adam --log-format json "
    "--no-epoch-checkpoints"
)
PRETRAIN = f"metro pretrain --data {{data}} --output-dir {{out}} {TINY}"
HYDRA_TINY = (
    f"--config-dir {ROOT}/fairseq_plugins/configs/pretraining --config-name metro_t5_tiny "
    f"common.user_dir={ROOT}/fairseq_plugins common.fp16=false common.log_interval=1 "
    "task.tokens_per_sample=32 dataset.max_tokens=256 ++dataset.num_workers=0 "
    "model.encoder_embed_dim=16 model.encoder_ffn_embed_dim=32 model.encoder_layers=1 "
    "model.encoder_attention_heads=2 model.max_positions=64 lr_scheduler.warmup_updates=2 "
    f"optimization.max_update={UPDATES} checkpoint.save_interval_updates=3 "
    "++checkpoint.keep_interval_updates=2 hydra.run.dir=. hydra.output_subdir=null"
)
FINETUNE = (
    "metro finetune --model {{w}}/t5 --data {data} --output-dir {out} --max-steps {steps} "
    "--logging-steps 1 --batch-size 8 --use-cpu --report-to none --dropout 0.1 "
    "--gradient-accumulation-steps 2 --learning-rate 0.001 --save-steps {save}"
)
SENTENCES = ["{{text}} Is it good?", "Good or bad: {{text}}", "{{text}} So it is", "Say: {{text}}"]


class World:
    """Inputs of all jobs, made once.

    Args:
        folder: for them.
        run: runs a command in a folder and checks that it succeeds.
        in_child: calls a function in a process of its own.
    """

    def __init__(self, folder: Path, run: Callable, in_child: Callable):
        self.folder = folder
        (folder / "text.txt").write_text(random_text(0, 1500))
        words = "metro prepare-text --input text.txt --out vocab --train-vocab 150 --workers 1"
        run(words.split(), folder)
        run(
            "metro prepare-text --input text.txt --out data --vocab vocab --workers 1".split(),
            folder,
        )
        make_world(folder / "world", num_rows=250)
        old = f"{PREPARE_PROMPTS.format(w=folder)} --workers 1 --limit 20"
        run(old.replace("--out out", "--out old_prompts").split(), folder)
        write_prepared(folder / "prompts", 60)
        in_child(lambda: write_t5(folder / "t5"))
        for name, seed in (("old", 2), ("new", 3)):
            train = FAIRSEQ.replace("--seed 1", f"--seed {seed}").format(data="data", updates=2)
            run(f"{train} --save-dir {name}".split(), folder)
            shutil.copyfile(folder / name / "checkpoint_last.pt", folder / f"{name}.pt")
            (folder / name / "checkpoint_best.pt").unlink()  # the same one
            words = f"metro convert to-hf {name}.pt --out hf_{name}/model --vocab vocab"
            run(words.split(), folder)
        lines = [line for line in random_text(5, 30).split("\n") if line]
        rows = [json.dumps({"text": line, "label": i % 2}) for i, line in enumerate(lines)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        prompts = {
            f"p{i}": {"jinja": f"{i} {SENTENCES[i % 4]} ||| {{{{answer_choices[label]}}}}",
                      "answer_choices": "No ||| Yes"}
            for i in range(8)
        }  # fmt: skip
        tasks = {name: {"data": "rows.jsonl", "prompts": prompts} for name in ("one", "two")}
        (folder / "suite.yaml").write_text(json.dumps({"tasks": tasks}))
        for name in ("old", "new"):
            run(evaluation(folder, f"{folder}/hf_{name}/model", name), folder)
            more = "old" if name == "new" else ""
            runs = [f"runs/{each}" for each in (name, more) if each]
            run(["metro", "report", *runs, "--out", f"report_{name}/report"], folder)


def evaluation(world: Path | str, model: str, name: str, out: str = "runs") -> list[str]:
    words = f"metro evaluate {model} --suite {world}/suite.yaml --out {out} --device cpu"
    return [*words.split(), "--run-name", name]


@dataclass
class Job:
    """A command that is killed; functions take the folder it works in, and the world's."""

    name: str
    words: Callable[[Path], list[str]]
    """Of the command, given the world's folder."""
    result: Callable[[Path], Any]
    """What has to be equal to that of a run left alone, from the folder."""
    begun: str = ""
    """What the command says at the beginning of the work; empty: killed at an operation on files
    between the first and the last one."""
    ended: str = ""
    """What it says at the end of it."""
    kept: Callable[[Path, str], float] | None = None
    """Progress that is on disk, which must not shrink; raises where a state is not complete."""
    old: Callable[[Path, Path], None] | None = None
    """Makes what the command replaces: (world, folder)."""
    losses: Callable[[str], dict] = lambda log: {}
    """Numbers in what the command says, which must be the same whenever they are said."""
    processes: int = 1


# --- training with fairseq ----------------------------------------------------------------------


def load(path: Path) -> dict:
    import torch

    return torch.load(path, weights_only=True, mmap=False)


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def saved_updates(folder: Path, log: str) -> float:
    said = [
        int(number) for number in re.findall(r"Saved checkpoint \S+ \(epoch \d+ @ (\d+) upd", log)
    ]
    last = folder / "save/checkpoint_last.pt"
    if not last.exists():
        newest = [int(path.stem.split("_")[2]) for path in folder.glob("save/checkpoint_*_*.pt")]
        assert not said or newest, "all checkpoints are gone"
        return max(newest, default=0)
    for path in folder.glob("save/*.pt"):
        state = load(path)
    state = load(last)
    updates = state["optimizer_history"][-1]["num_updates"]
    assert updates >= max(said, default=0), f"saved {max(said)}, there is {updates}"
    return updates


def trained(folder: Path, name: str = "save") -> dict[str, bytes]:
    state = load(folder / name / "checkpoint_last.pt")
    tensors = dict(state["model"])
    for key, values in state["last_optimizer_state"]["state"].items():
        tensors |= {
            f"{key}.{name}": value for name, value in values.items() if hasattr(value, "numpy")
        }
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def logged_losses(log: str) -> dict[str, str]:
    lines = re.findall(r"(\{\"epoch\".*\})", log)
    rows = [json.loads(line) for line in lines]
    return {
        row["num_updates"]: row["loss"] for row in rows if "num_updates" in row and "loss" in row
    }


BEGUN, ENDED = r'train_inner.*"num_updates"', rf'"num_updates": "{UPDATES}"'
training = dict(begun=BEGUN, ended=ENDED, kept=saved_updates, result=trained, losses=logged_losses)


# --- training with the Trainer, and evaluation --------------------------------------------------


def checkpoints(folder: Path, log: str) -> float:
    from safetensors.torch import load_file

    from metro.training.output_folder import complete_checkpoints

    found = complete_checkpoints(folder / "out")
    for path in found[-2:]:  # older ones are being deleted
        load_file(path / "model.safetensors")
        load(path / "optimizer.pt")
    return int(found[-1].name.split("-")[1]) if found else 0


def finished_model(folder: Path, name: str = "out") -> dict:
    history = load_json(folder / name / "trainer_state.json")["log_history"]
    losses = {line["step"]: line["loss"] for line in history if "loss" in line}
    return {"weights": (folder / name / "model.safetensors").read_bytes(), "losses": losses}


def trainer(updates: int) -> dict:
    """Of a job that trains with Hugging Face's Trainer: when it is at work, how it is checked."""
    return {
        **{"begun": rf"update \d+/{updates}", "ended": f"update {updates}/{updates}"},
        **{"kept": checkpoints, "result": finished_model},
    }


def finished_prompts(folder: Path, log: str) -> float:
    from metro.evaluation.runs.run_folder import read_run

    said = set(re.findall(r"^(\w+ / \w+): [\d.]+ % of", log, re.M))
    if not (folder / "runs/run/run.json").exists():
        assert not said
        return 0
    run = read_run(folder / "runs/run")
    for result in run.results:
        assert run.scores(result), result
    assert said <= {f"{result.task} / {result.prompt}" for result in run.results}
    return len(run.results)


def evaluated(folder: Path, name: str = "runs/run") -> dict:
    found = contents(folder / name)
    lines = [json.loads(line) for line in found["results.jsonl"].decode().splitlines()]
    found["results.jsonl"] = without_seconds(lines)
    found["summary.json"] = without_seconds(json.loads(found["summary.json"]))
    return found


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("seconds", "crc32")  # the latter is of a line with the former
        return {name: without_seconds(v) for name, v in value.items() if name not in left_out}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


# --- folders that appear or are replaced --------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder but locks; of manifests all but the times of their inputs."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (".lock", "lock"):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    for name in ("prepare_text.json", "prompts.json"):
        if name in found:
            found[name] = {**json.loads(found[name]), "settings": None, "crc32": None}
    return found


def prepared_items(folder: Path, log: str) -> float:
    """Position of an unfinished preparation; a finished one is ahead of all."""
    if (folder / "out").exists():
        return float("inf")
    state = folder / "out.partial/state.json"
    if not state.exists():
        return float("inf") if any((folder / "out.partial").glob("pr*.json")) else 0
    state = json.loads(state.read_text())
    if "position" in state:
        return state["train"][0] + state["valid"][0]
    rendered = [facts["rendered"] for facts in state["done"].values()]
    return sum(rendered) + state["current"].get("next", 0)


def replaces(name: str) -> dict:
    """Of a job that replaces `out` by `out`: how it is checked."""
    return {"result": lambda folder: contents(folder / name)}


def whole(name: str, partial: str | None = None):
    """A check that an output is there, or that the new one is complete and only to be moved."""

    def kept(folder: Path, log: str) -> float:
        if partial and any((folder / partial).glob("pr*.json")):
            return 0
        assert (folder / name).exists(), f"{name} is gone"
        return 0

    return kept


def file_result(folder: Path) -> dict[str, bytes]:
    state = load(folder / "out.pt")
    return {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()}


PREPARE_PROMPTS = (
    "metro prepare-prompts --mixture {w}/world/mix.yaml --templates {w}/world/templates "
    "--data-dir {w}/world/data --out out"
)


def words(text: str) -> Callable[[Path], list[str]]:
    return lambda world: text.format(w=world).split()


PRETRAINING = words(PRETRAIN.format(data="{w}/data", out="out", updates=UPDATES))

JOBS = [
    Job(
        "fairseq-train",
        words(FAIRSEQ.format(data="{w}/data", updates=UPDATES) + " --save-dir save"),
        **training,
    ),
    Job(
        "fairseq-hydra-train",
        words(f"fairseq-hydra-train {HYDRA_TINY} task.data={{w}}/data checkpoint.save_dir=save"),
        **training,
    ),
    Job(
        "fairseq-train, one of two workers",
        words(FAIRSEQ.format(data="{w}/data", updates=UPDATES) + " --save-dir save"),
        **training,
        processes=2,
    ),
    Job("metro pretrain", PRETRAINING, **trainer(UPDATES)),
    Job("metro pretrain, one of two workers", PRETRAINING, **trainer(UPDATES), processes=2),
    Job(
        "metro finetune",
        words(FINETUNE.format(data="{w}/prompts", out="out", steps=12, save=2)),
        **trainer(12),
    ),
    Job(
        "metro evaluate",
        lambda world: evaluation(world, f"{world}/hf_new/model", "run"),
        begun=r"(one|two) / p\d: [\d.]+ %",
        ended=r"two / p7: [\d.]+ %",
        kept=finished_prompts,
        result=evaluated,
    ),
    Job(
        "metro prepare-text",
        words("metro prepare-text --input {w}/text.txt --out out --vocab {w}/vocab --workers 1"),
        kept=prepared_items,
        **replaces("out"),
    ),
    Job(
        "metro prepare-text --overwrite",
        words(
            "metro prepare-text --input {w}/text.txt --out out --vocab {w}/vocab --workers 1 "
            "--overwrite"
        ),
        kept=whole("out", "out.partial"),
        old=lambda world, folder: shutil.copytree(world / "vocab", folder / "out"),
        **replaces("out"),
    ),
    Job(
        "metro prepare-prompts",
        words(PREPARE_PROMPTS + " --workers 1"),
        kept=prepared_items,
        **replaces("out"),
    ),
    Job(
        "metro prepare-prompts --overwrite",
        words(PREPARE_PROMPTS + " --workers 1 --format fairseq --vocab {w}/vocab --overwrite"),
        kept=whole("out", "out.partial"),
        old=lambda world, folder: shutil.copytree(world / "old_prompts", folder / "out"),
        **replaces("out"),
    ),
    Job(
        "metro convert to-hf --overwrite",
        words("metro convert to-hf {w}/new.pt --out model --vocab {w}/vocab --overwrite"),
        kept=whole("model"),
        old=lambda world, folder: shutil.copytree(world / "hf_old/model", folder / "model"),
        **replaces("model"),
    ),
    Job(
        "metro convert to-fairseq --overwrite",
        words("metro convert to-fairseq {w}/hf_new/model --out out.pt --overwrite"),
        kept=whole("out.pt"),
        old=lambda world, folder: shutil.copyfile(world / "old.pt", folder / "out.pt"),
        result=file_result,
    ),
    Job(
        "metro report",
        words("metro report {w}/runs/new {w}/runs/old --out report"),
        kept=whole("report"),
        old=lambda world, folder: shutil.copytree(world / "report_old/report", folder / "report"),
        **replaces("report"),
    ),
]
