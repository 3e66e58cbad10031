"""`metro evaluate` as a user calls it.

Oracles: exit statuses and files; a run of one process; a run that nobody killed.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import metro
from metro.cli.main import app
from metro.evaluation.runs.run_folder import read_run
from metro.evaluation.settings import EvaluationSettings, short_name
from metro.models import registry
from metro.utils.locks import locked
from tests.conftest import ROOT
from tests.evaluation.runs.test_published import registered
from tests.evaluation.runs.test_runner import all_scores, without_times
from tests.evaluation.toy import write_suite
from tests.processes import METRO, run_python


@pytest.fixture(scope="module")
def model(golden):
    return str(golden / "hf_export/t5_prompt_tiny_f")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("toys"))


def call(*arguments):
    """In this process: status, what was printed, the exception."""
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def options(toys, out):
    return ["--suite", toys, "--data-dir", toys.parent, "--out", out, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, model, toys):
    out = tmp_path_factory.mktemp("whole")
    done = call(model, *options(toys, out), "--allow-missing")
    return out / "t5_prompt_tiny_f-direct-toys", done


def test_a_run_that_another_evaluation_writes_is_refused(model, toys, tmp_path):
    """Oracle: the folder stays absent meanwhile, and works afterwards."""
    with locked(tmp_path / "t5_prompt_tiny_f-direct-toys"):
        done = call(model, *options(toys, tmp_path), "--task", "colour")
    assert "is being written by" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
    assert call(model, *options(toys, tmp_path), "--task", "colour").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["t5_prompt_tiny_f-direct-toys"]


def test_a_run_leaves_results_summary_and_what_was_run(whole_run, model):
    """Oracle: the form of a run folder; the suite's own list of tasks."""
    folder, done = whole_run
    assert done.exit_code == 0, done.output
    info = json.loads((folder / "run.json").read_text())
    assert (info["model"], info["method"], info["suite"]) == (model, "direct", "toys")
    assert info["registered"] is None
    assert info["protocol"]["family"] == "metro"
    assert list(info["tasks"]) == ["colour", "truth", "gone"]
    assert info["options"]["dtype"] == "float32"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["missing"] == ["gone"]
    for words in ("protocol metro", "colour / plain:", "average of 2", "left out, 1 task or pr"):
        assert words in done.output


def test_another_protocol_can_be_asked_for(tmp_path, model, toys):
    """Oracle: what T0's evaluation reads; the option is part of the run."""
    arguments = [*options(toys, tmp_path), "--task", "truth"]
    done = call(model, *arguments, "--protocol", "t0")
    assert done.exit_code == 0, done.output
    assert "protocol t0: sources without special tokens" in done.output
    info = json.loads((tmp_path / "t5_prompt_tiny_f-direct-toys" / "run.json").read_text())
    assert (info["protocol"]["family"], info["protocol"]["source_special_tokens"]) == ("t0", False)
    assert "protocol: family 't0', this one has 'metro'" in str(call(model, *arguments).exception)


def test_missing_data_fail_the_command_unless_allowed(tmp_path, model, toys):
    """Oracle: status 3, the rest of the suite evaluated and kept."""
    done = call(model, *options(toys, tmp_path))
    assert done.exit_code == 3
    assert "gone: nowhere is not in" in done.output
    assert len(read_run(tmp_path / "t5_prompt_tiny_f-direct-toys").results) == 4


def test_narrowed_runs_grow_into_the_whole(tmp_path, model, toys, whole_run):
    """Oracle: the run of everything at once; results may be in another order."""
    for more in (["--task", "truth"], ["--prompt", "plain"], ["--allow-missing"]):
        assert call(model, *options(toys, tmp_path), *more).exit_code == 0
    folder = tmp_path / "t5_prompt_tiny_f-direct-toys"
    key = lambda line: (line["task"], line["prompt"])  # noqa: E731
    assert sorted(without_times(folder), key=key) == sorted(without_times(whole_run[0]), key=key)
    assert all_scores(folder) == all_scores(whole_run[0])


def test_several_models_and_methods_make_a_folder_each(tmp_path, model, toys, golden):
    """Oracle: the names of the folders."""
    other = golden / "hf_export/metro_tiny_a"
    arguments = [*options(toys, tmp_path), "--task", "truth", "--method", "channel"]
    assert call(model, other, *arguments).exit_code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["metro_tiny_a-channel-toys", "t5_prompt_tiny_f-channel-toys"]


def test_a_model_that_fails_does_not_end_the_others(tmp_path, model, toys):
    """Oracle: the run of the good model; status, message and no folder for the bad one."""
    broken, (damaged, tokenizer) = tmp_path / "broken", metro.load(model)
    damaged.lm_head.weight.data[3, 5] = float("nan")
    for part in (damaged, tokenizer):
        part.save_pretrained(broken)
    done = call(broken, model, *options(toys, tmp_path / "out"), "--task", "truth")
    assert f"{broken}: the weight " in str(done.exception)
    assert "has numbers that are not finite" in str(done.exception)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["t5_prompt_tiny_f-direct-toys"]
    assert len(read_run(tmp_path / "out/t5_prompt_tiny_f-direct-toys").results) == 1


def test_checkpoints_of_several_runs_have_folders_of_their_own():
    """Oracle: by hand; names that stay, and names that would fold into one."""
    names = ["t5-base", "runs/t0", "a/checkpoint-150", "b/checkpoint-150", "b/checkpoint_last.pt"]
    expected = ["t5-base", "t0", "a_checkpoint-150", "b_checkpoint-150", "b_checkpoint_last"]
    assert [short_name(name) for name in names] == expected
    assert short_name("c/model") == "c_model"
    assert short_name("my model") == "my_model" and short_name(str(ROOT)) == short_name(f"{ROOT}/.")
    others = {short_name(name) for name in ("模型甲", "模型乙", "modèle", "x" * 300, "x" * 299)}
    assert len(others) == 5 and all(len(name.encode()) < 100 for name in others)
    long = EvaluationSettings(models=["m"]).folder_name("模型" * 80, "评估" * 80)
    assert len(long.encode()) < 255


@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_models_that_would_share_a_folder_are_refused_first(tmp_path, model, toys, extra):
    """Oracle: the message names both; nothing is evaluated, and no run before is deleted."""
    arguments = [*options(toys, tmp_path / "out"), "--task", "truth"]
    assert call(model, *arguments).exit_code == 0
    other = tmp_path / "t5_prompt_tiny_f"
    other.symlink_to(model)
    done = call(model, other, *arguments, *extra)
    assert isinstance(done.exception, ValueError), done.output
    assert f"models {model} and {other} would share the run folder" in str(done.exception)
    assert "one at a time, each with a run_name of its own" in str(done.exception)
    assert "loading" not in done.output
    assert read_run(tmp_path / "out" / "t5_prompt_tiny_f-direct-toys").model == model
    assert call(model, other, *arguments, "--method", "channel").exception is not None


def test_overwrite_starts_again(tmp_path, model, toys):
    """Oracle: the same run with another limit is refused, then replaced."""
    arguments = [*options(toys, tmp_path), "--task", "truth"]
    assert call(model, *arguments).exit_code == 0
    refused = call(model, *arguments, "--limit", 5)
    assert "or --overwrite" in str(refused.exception)
    assert call(model, *arguments, "--limit", 5, "--overwrite").exit_code == 0
    assert read_run(tmp_path / "t5_prompt_tiny_f-direct-toys").results[0].num_examples == 5


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "colours"], "no task 'colours': did you mean 'colour'"),
        (["--prompt", "plane"], "no task here has a prompt 'plane': did you mean 'plain'"),
        (["--check-published"], "no registered model is called"),
        (["--run-name", "a/b"], "use a name without slashes"),
        (["--task", "gone"], "no task of toys can be evaluated: nowhere is not in"),
        (["--device", "toaster"], "use cpu, cuda"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--max-target-length", "2"], "max_target_length is 2"),
        (["--max-source-length", "-5"], "max_source_length is -5"),
    ],
)
def test_bad_options_are_one_clear_message(tmp_path, model, toys, extra, message):
    """Oracle: the message; no run folder is left that could be taken for a run."""
    done = call(model, *options(toys, tmp_path), *extra)
    assert isinstance(done.exception, ValueError), done.output
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.rglob("results.jsonl"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--check-published", "--suite", "t0", "--limit", "5"], "needs all rows"),
        (["--check-published", "--suite", "mmlu"], "mmlu are registered; it has flipped14, t0"),
        (["--check-published", "--suite", "t0", "--method", "channel"], "method direct, the run"),
    ],
)
def test_what_cannot_be_checked_is_said_before_anything_is_loaded(tmp_path, extra, message):
    """Oracle: the registry; there is no data folder and no network that could be asked."""
    done = call("bigscience/T0_3B", "--out", tmp_path, "--data-dir", tmp_path, *extra)
    assert isinstance(done.exception, ValueError), done.output
    assert message in str(done.exception)


def test_missed_published_numbers_fail_the_command_when_all_has_been_run(
    tmp_path, model, monkeypatch
):
    """Oracle: the accuracy of a run before, registered as published for one model and, ten points
    higher, for another that is the same folder."""
    suite = write_suite(tmp_path / "data").rename(tmp_path / "data" / "t0.yaml")
    arguments = [*options(suite, tmp_path / "out"), "--task", "truth"]
    assert call(model, *arguments).exit_code == 0
    accuracy = 100 * read_run(tmp_path / "out" / "t5_prompt_tiny_f-direct-t0").results[0].accuracy
    models = {
        name: dataclasses.replace(registered(truth=value), name=name, hub_id=model)
        for name, value in (("higher", accuracy + 10), ("same", accuracy))
    }
    monkeypatch.setattr(registry, "registered_models", lambda: models)
    done = call(*models, *arguments, "--check-published")
    expected = "higher misses its published accuracy by more than 1.0 points on 1 of 1 task"
    assert str(done.exception) == f"{expected}: truth -10.00"
    assert "all 1 within 1.0 points" in done.output
    assert read_run(tmp_path / "out" / "same-direct-t0").registered == "same"
    assert call("same", *arguments, "--check-published").exit_code == 0


def test_published_numbers_without_data_are_named_and_fail_the_command(
    tmp_path, model, monkeypatch
):
    """Oracle: status 3 where data are missing, 0 where the user asked for less; both verdicts
    name the task that was not checked."""
    suite = write_suite(tmp_path / "data").rename(tmp_path / "data" / "t0.yaml")
    models = {"m": dataclasses.replace(registered(truth=50.0, gone=50.0), name="m", hub_id=model)}
    monkeypatch.setattr(registry, "registered_models", lambda: models)
    arguments = [*options(suite, tmp_path / "out"), "--check-published", "--tolerance", "100"]
    for narrowed, status in (["--task", "truth"], 0), (["--task", "truth", "--task", "gone"], 3):
        done = call("m", *arguments, *narrowed)
        assert done.exit_code == status, done.output
        assert "1 checked task within 100.0 points" in done.output
        assert "not checked: gone" in done.output


def test_wrong_options_are_refused_before_torch_is_imported(tmp_path):
    """Oracle: an interpreter in which torch cannot be imported."""
    blocked = "import sys; sys.modules['torch'] = None; from metro.cli.main import main; main()"
    for name, *extra, message in [
        ("metro_t0_bsae", "lists them); did you mean 'metro_t0_base'"),
        (str(tmp_path), "has no config.json, so it is not a model"),
        ("metro_t0_base", "--suite", "t1", "did you mean 't0'"),
        ("metro_t0_base", "--data-dir", "nowhere", "--data-dir nowhere is not a folder"),
        ("metro_t0_base", "--bigbench-dir", "here", "--bigbench-dir here is not a folder"),
        ("metro_t0_base", "--method", "reverse", "method is 'reverse'"),
        ("metro_t0_base", "--templates", "nowhere", "templates at nowhere"),
        ("metro_t0_base", "--suite", "mmlu", "--data-dir", str(tmp_path), "no task of mmlu can be"),
    ]:
        done = run_python("-c", blocked, "evaluate", name, *extra, code=2, cwd=ROOT)
        assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_killed_run_goes_on(tmp_path, model, toys, whole_run):
    """Oracle: the run that nobody killed. SIGKILL hits in the middle of the suite."""
    arguments = [model, *map(str, options(toys, tmp_path)), "--allow-missing"]
    folder = tmp_path / "t5_prompt_tiny_f-direct-toys"
    process = subprocess.Popen(
        [sys.executable, *METRO, "evaluate", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    listed = folder / "results.jsonl"
    while process.poll() is None and not listed.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(read_run(folder).results) <= 4
    assert call(*arguments).exit_code == 0
    assert without_times(folder) == without_times(whole_run[0])
    assert all_scores(folder) == all_scores(whole_run[0])
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "flipped"])
def test_two_processes_write_what_one_writes(tmp_path, model, toys, method):
    """Oracle: one process, bit for bit but for times."""
    arguments = ["--allow-missing", "--method", method]
    alone = call(model, *options(toys, tmp_path / "alone"), *arguments)
    assert alone.exit_code == 0
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    command = [*METRO, "evaluate", model, *options(toys, tmp_path / "two"), *arguments]
    done = run_python(*launch, *command, cwd=ROOT)
    name = f"t5_prompt_tiny_f-{method}-toys"
    assert without_times(tmp_path / "two" / name) == without_times(tmp_path / "alone" / name)
    assert all_scores(tmp_path / "two" / name) == all_scores(tmp_path / "alone" / name)
    assert done.stderr.count("protocol metro") == 1
