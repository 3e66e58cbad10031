"""A suite and a model small enough to evaluate in a blink."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from metro.evaluation.runs.run_folder import RunFolder
from metro.evaluation.runs.runner import Scoring, evaluate_prompts, run_info
from metro.evaluation.tasks.loading import load_tasks
from metro.evaluation.tasks.protocol import choose_protocol
from metro.evaluation.tasks.suites import find_suite
from metro.evaluation.tasks.task import Sources
from metro.processes import Processes
from metro.utils.identity import model_identity
from metro.utils.progress import SILENT

SUITE = """
title: Toys
tasks:
  colour:
    data: colour.jsonl
    prompts:
      plain: &plain
        jinja: "What colour is {{thing}}? ||| {{answer_choices[answer]}}"
        answer_choices: "{{colours | join('|||')}}"
      again: *plain
      listed:
        jinja: "{{colours | join(' or ')}} {{thing}}: which? ||| {{answer_choices[answer]}}"
        answer_choices: "{{colours | join('|||')}}"
  truth:
    data: truth.jsonl
    prompts:
      ask:
        jinja: "Is it true that {{text}}? ||| {{answer_choices[label]}}"
        answer_choices: yes ||| no
  gone:
    dataset: nowhere
    split: validation
    prompts: [none]
"""


def write_suite(folder: Path) -> Path:
    """The suite with its rows; the task "gone" has none."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = [
        {"thing": f"thing {n}", "colours": ["red", "dark green", "blue"][: 2 + n % 2],
         "answer": n % 2} for n in range(14)
    ]  # fmt: skip
    truths = [{"text": f"{n} is {n % 7}", "label": int(n >= 7)} for n in range(17)]
    for name, rows in (("colour", colours), ("truth", truths)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "toys.yaml").write_text(SUITE)
    return folder / "toys.yaml"


def run(
    folder: Path,
    suite_file: Path,
    model: PreTrainedModel,
    tokenizer,
    *,
    method: str = "direct",
    progress=SILENT,
    missing_tasks=None,
    content=None,
    truncation_side: str = "right",
    **sources,
):
    """Evaluate a suite (its file or folder) in this process; return the number of new prompts."""
    suite = find_suite(str(suite_file))
    data = Sources(data_dir=suite_file.parent, **sources)
    tasks, missing = load_tasks(suite, data)
    assert list(missing) in ([name for name in suite.tasks if name == "gone"], missing_tasks or [])
    scoring = Scoring(method, batch_tokens=300)
    protocol = choose_protocol(None, model.config, method, truncation_side=truncation_side)
    dtype = str(model.dtype).removeprefix("torch.")
    content = content or model_identity(model, tokenizer)
    info = run_info("toy", None, content, dtype, suite, tasks, data, protocol, scoring)
    alone = Processes(0, 1, torch.device("cpu"))
    num_new, _ = evaluate_prompts(
        model, tokenizer, tasks, RunFolder(folder, info), suite.name, protocol, scoring, alone,
        progress,
    )  # fmt: skip
    return num_new


def without_times(folder):
    """Results of a run, without what differs from one run to the next."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "crc32")} for line in lines]
