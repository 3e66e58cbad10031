"""The shell and Python blocks of README and docs run, in the order of the pages.

Each runs as it is printed, in a folder like the checkout; ``small.py`` makes the programs small.
Oracle: the exit status, and the files that the pages promise.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from .pages import ROOT, Block, blocks
from .small import environment, write_inputs, write_programs

DOCS = [
    ROOT / "docs" / f"{name}.md"
    for name in (
        *(
            "installation",
            "text",
            "pretraining",
            "models",
            "prompts",
            "finetuning",
            "flipped",
        ),
        *(
            "rank",
            "evaluation",
            "report",
            "operations",
            "python_api",
            "architecture",
            "troubleshooting",
        ),
    )
]
SAVED_AS = {"my_mixture.yaml": "datasets:", "my_templates/my_reviews/templates.yaml": "dataset:",
            "colours.yaml": "title: Colours", "colours.jsonl": '{"thing"'}  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A folder like the checkout, with the inputs that the pages name."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("scripts", "fairseq_plugins", "metro", "benchmarks", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    write_inputs(folder)
    (tmp_path / "programs").mkdir()
    write_programs(tmp_path / "programs")
    return folder


def run(block: Block, folder: Path, updates: int = 2) -> None:
    program = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": ["python", "-c"]}[block.language]
    done = subprocess.run(
        [*program, block.text],
        cwd=folder,
        env=environment(folder.parent / "programs", folder, updates),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{block.where}\n{block.text}{done.stdout}{done.stderr[-4000:]}"


def save(block: Block, folder: Path) -> None:
    """A block that shows a file, under the name that the page gives it."""
    for name, start in SAVED_AS.items():
        if block.text.startswith(start):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(block.text)


def run_page(page: Path, folder: Path) -> None:
    for number, block in enumerate(blocks(page), 1):
        if block.language in ("sh", "python") and not block.not_run:
            run(block, folder, updates=2 * number)  # the next command trains on
        elif block.language in ("yaml", "json"):
            save(block, folder)


@pytest.mark.slow
def test_blocks_of_the_readme_run(checkout):
    run_page(ROOT / "README.md", checkout)
    assert (checkout / "my_model/model.safetensors").exists()
    assert (checkout / "report/report.html").exists()


@pytest.mark.slow
@pytest.mark.fairseq
def test_blocks_of_the_pages_run(checkout):
    for page in DOCS:
        if page.stem == "models":  # a model pretrained with span corruption, the demo's output
            run(Block("sh", T5, "a T5", None), checkout)
        run_page(page, checkout)
        if page.stem == "models":
            shutil.copytree(checkout / "data/books", checkout / "demo/data")
            shutil.copytree(checkout / "my_model", checkout / "demo/model")
    assert (checkout / "answers.txt").read_text().count("\n") == 2
    assert (checkout / "losses.png").exists() and (checkout / "report/report.html").exists()


@pytest.mark.slow
def test_the_notebook_runs(checkout):
    """Oracle: its files, and that 200 rows help on rows that the model has not seen."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code.append("[(was, now)] = zip(before.accuracies.values(), after.accuracies.values())")
    code.append("assert was < 0.6 and now > 0.9, (was, now)")
    run(Block("python", "\n".join(code), "quickstart.ipynb", None), checkout)
    assert (checkout / "quickstart/report/report.html").exists()
    assert (checkout / "quickstart/ranked.csv").read_text().count("\n") == 61


T5 = """
fairseq-hydra-train --config-dir fairseq_plugins/configs/pretraining --config-name t5_tiny \
  task.data=data/books checkpoint.save_dir=runs/t5
metro convert to-hf runs/t5/checkpoint_last.pt --out my_t5
"""
