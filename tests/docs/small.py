"""The programs that the pages call, with options that make them small.

``write_programs(folder)`` puts scripts named like the programs into a folder for PATH. Each calls
the real program with the words of the page and some more: a model of 32 units, a few updates, the
invented data of ``write_inputs``. Nothing else of a command is changed.
"""

import gzip
import json
import os
import runpy
import sys
import sysconfig
from pathlib import Path

from tests.data.prepared import random_text
from tests.data.prompts.toys import write_rows, write_templates

PLUGINS_SIZE = {
    "encoder-embed-dim": 32,
    "encoder-ffn-embed-dim": 64,
    "encoder-layers": 1,
    "encoder-attention-heads": 2,
    "max-positions": 512,
}
MMLU = ["--task", "anatomy"]
CHOICES = "No ||| Yes"
NLI = {
    "MNLI crowdsource": (CHOICES, "{{premise}} So {{hypothesis}}? ||| {{answer_choices[label]}}")
}
NEWS = {
    "classify": ("Sport ||| Money", "{{text}} What is it about? ||| {{answer_choices[label]}}"),
    "ask": ("No ||| Yes", "Is this about money: {{text}} ||| {{answer_choices[label]}}"),
}
LIKE = {"like": (CHOICES, "{{text}} Did the reviewer like it? ||| {{answer_choices[label]}}")}
ARC = {
    "heres_a_problem": (
        "A ||| B ||| C ||| D",
        "{{question}} {{choices.text | join(', ')}} ||| {{answerKey}}",
    )
}


def write_programs(folder: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for name in ("metro", "fairseq-train", "fairseq-hydra-train", "fairseq-validate", "torchrun"):
        program = folder / name
        program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
            f"from tests.docs.small import call\ncall({name!r})\n"
        )
        program.chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)


def call(name: str) -> None:
    """Run the real program with this process's arguments, made small."""
    sys.argv = [name, *smaller(name, sys.argv[1:])]
    if name == "metro":
        from metro.cli.main import main

        sys.exit(main())
    if name == "torchrun":
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(Path(sysconfig.get_path("scripts")) / name), run_name="__main__")


def smaller(name: str, words: list[str]) -> list[str]:
    """The words of a command, and options that make it small."""
    if name == "torchrun":
        return ["2" if word == "8" else word for word in words]
    if name == "fairseq-validate":
        return [*words, "--cpu"]
    if name == "fairseq-hydra-train":
        values = {f"++model.{key.replace('-', '_')}": size for key, size in PLUGINS_SIZE.items()}
        values |= {"common.fp16": "false", "++common.cpu": "true", "task.tokens_per_sample": 128}
        values |= {"optimization.max_update": os.environ["UPDATES"]}
        values |= {"optimization.update_freq": "[1]", "common.log_interval": 1}
        values |= {"dataset.max_tokens": 1024, "++dataset.num_workers": 0}
        values |= {"lr_scheduler.warmup_updates": 1, "++dataset.validate_interval_updates": 0}
        if any("configs/finetuning" in word for word in words):
            values |= {"++task.max_source_tokens": 100, "++task.max_target_tokens": 40}
        return [*words, *(f"{key}={value}" for key, value in values.items())]
    if name == "fairseq-train":
        words = [word for word in words if word != "--fp16"]
        sizes = [part for key, size in PLUGINS_SIZE.items() for part in (f"--{key}", str(size))]
        sizes += ["--tokens-per-sample", "128", "--max-tokens", "1024", "--num-workers", "0"]
        updates = ["--max-update", os.environ["UPDATES"], "--update-freq", "1"]
        return [*words, *sizes, "--cpu", *updates]
    return [*words, *more_of_metro(words)]


def more_of_metro(words: list[str]) -> list[str]:
    command = words[0]
    local = [] if "--data-dir" in words else ["--data-dir", "rows"]
    if command == "prepare-text":
        more = ["--workers", "1", "--valid-fraction", "0.2"]
        return more + (["--train-vocab", "120"] if "--train-vocab" in words else [])
    if command == "prepare-prompts":
        return [*local, "--workers", "1"]
    if words[:2] == ["prompts", "show"]:
        return local
    if command == "pretrain":
        sizes = [part for key, size in PLUGINS_SIZE.items() for part in (f"--{key}", str(size))]
        sizes += ["--tokens-per-sample", "128", "--max-tokens", "1024", "--num-workers", "0"]
        sizes += ["--update-freq", "1", "--warmup-updates", "1", "--log-interval", "1"]
        return [*sizes, "--max-update", os.environ["UPDATES"], "--cpu", "--no-fp16", "--no-bf16"]
    if command == "finetune":
        is_there = Path(words[words.index("--data") + 1]).exists()
        return ["--max-steps", "2", "--batch-size", "2", *([] if is_there else local)]
    if command == "evaluate":
        if "--data" in words:
            return ["--limit", "2"]
        suite = words[words.index("--suite") + 1]
        tasks = {"t0": ["--task", "rte", "--prompt", "MNLI crowdsource"], "mmlu": MMLU}
        tasks["blimp"] = ["--task", "anaphor_agreement"]
        return [*local, "--limit", "2", *tasks.get(suite, [])]
    if words[:2] == ["convert", "to-hf"]:
        return ["--overwrite"]
    if command in ("generate", "flip"):
        return ["--max-new-tokens", "4"]
    return []


def write_inputs(folder: Path) -> None:
    """Text, rows and templates, under the names that the pages use."""
    for seed, name in enumerate(("books.txt", "more.txt")):
        (folder / name).write_text(random_text(seed, 300))
    (folder / "corpus").mkdir()
    for number in range(16):
        (folder / f"corpus/{number}.txt").write_text(random_text(number, 30))
    documents = random_text(2, 100).split("\n\n")
    with gzip.open(folder / "web.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    for name in ("mails.csv", "mails_test.csv"):
        mails = "My parcel never came.,complaint\nHow are you?,question\nIt is lovely.,praise\n"
        (folder / name).write_text("body,label\n" + mails * 4)
    (folder / "questions.txt").write_text("what sat on the mat?\nwho went home?\n")

    sentences = random_text(3, 20).split("\n")
    labels = [{"text": text or "-", "label": i % 2} for i, text in enumerate(sentences)]
    pairs = [{"premise": row["text"], "hypothesis": "so", "label": row["label"]} for row in labels]
    for split in ("train", "test"):
        write_rows(folder / "rows", "ag_news", split, labels)
    for split in ("train", "validation"):
        write_rows(folder / "my_data", "my_reviews", split, labels)
        write_rows(folder / "rows", "super_glue", split, pairs, "rte")
    questions = [
        {"question": s, "choices": ["a", "b", "c", "d"], "answer": 1} for s in sentences[:3]
    ]
    write_rows(folder / "data", "mmlu", "test", questions, "anatomy")
    lines = [
        json.dumps({"sentence_good": f"it is {s}", "sentence_bad": f"it are {s}"}) + "\n"
        for s in sentences[:3]
    ]
    (folder / "data/blimp").mkdir()
    for paradigm in ("anaphor_gender_agreement", "anaphor_number_agreement"):
        (folder / f"data/blimp/{paradigm}.jsonl").write_text("".join(lines))
    templates = folder / "templates"
    write_templates(templates, "ag_news", NEWS)
    write_templates(templates, "super_glue", NLI, "rte")
    write_templates(templates, "ai2_arc", ARC, "ARC-Challenge")


def environment(programs: Path, folder: Path, updates: int) -> dict[str, str]:
    """Of a block; pretraining stops after so many updates."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return {
        **os.environ,
        **{"PATH": path, "PYTHONPATH": str(root), "METRO_TEMPLATES": str(folder / "templates")},
        **{
            "UPDATES": str(updates),
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
    }
