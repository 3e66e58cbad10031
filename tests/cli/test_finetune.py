"""`metro finetune` as a user types it."""

import sys

import pytest
import yaml
from click.testing import CliRunner

import metro
from metro.cli.main import load_command
from tests.conftest import ROOT


def run(*arguments: str):
    return CliRunner().invoke(load_command("finetune"), list(arguments))


def test_a_model_is_trained_from_a_file_of_options(prepared, t5_folder, tmp_path):
    options = {
        "model": str(t5_folder),
        "data": str(prepared),
        "output_dir": str(tmp_path / "wrong"),
        "objective": "flipped",
        "max_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    out = tmp_path / "out"
    done = run("--config", str(tmp_path / "run.yaml"), "--output-dir", str(out))
    assert done.exit_code == 0, done.output
    assert f"loading {t5_folder}\n" in done.output
    assert "update 3/3" in done.output and "ranked_right" in done.output
    assert f"{out}: the model after 3 updates" in done.output
    assert not (tmp_path / "wrong").exists()
    assert metro.load(out).model.config.vocab_size > 0
    kept = yaml.safe_load((out / "finetune.yaml").read_text())
    assert kept["objective"] == "flipped" and kept["unlikelihood_weight"] == 3.0


def test_a_mixture_is_prepared_first(testdata, t5_folder, tmp_path):
    """Real rows and templates; oracle: the number of rows of the one dataset that is named."""
    if not (testdata / "data/quarel").is_dir():
        pytest.skip("no rows of quarel in the test data")
    done = run(
        *f"--model {t5_folder} --data flipped --dataset quarel --data-dir {testdata}/data".split(),
        *f"--templates {testdata}/prompts/templates --output-dir {tmp_path / 'out'}".split(),
        *"--objective flipped --max-steps 2 --use-cpu --report-to none --batch-size 2".split(),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert (tmp_path / "out/data/prompts.json").is_file()
    assert len(list((tmp_path / "out/data/train").iterdir())) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model m --data d", "missing: --output-dir"),
        ("--model m --data d --output-dir o --objective flip", "use one of direct, channel"),
        ("--config nowhere.yaml", "no file nowhere.yaml"),
        ("--model m --data d --output-dir o", "no file or folder m, and no registered model"),
        ("--model a/m --data d --output-dir o", "no mixture 'd': there are t0, "),
        ("--model a/m --data tests --output-dir o", "tests is not a folder of prepared prompts"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "metro.finetuning.run", None)  # nor is torch imported for it
    done = run(*arguments.split())
    assert done.exit_code == 1 and isinstance(done.exception, ValueError)
    assert message in str(done.exception) and "\n" not in str(done.exception)


def test_a_vocabulary_that_is_none_is_refused(tmp_path):
    sources = f"--model a/m --data t0 --output-dir o --vocab {tmp_path}"
    assert "has no sp.model" in str(run(*sources.split()).exception)
