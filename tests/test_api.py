"""The public functions, run for real on tiny data.

Oracles: what the command line writes and prints for the same options; results computed apart.
"""

import json

import pytest

import metro
from metro.evaluation.settings import EvaluationSettings
from tests.data.prepared import files_of
from tests.data.prompts.toys import files_of as prompt_files_of
from tests.data.prompts.toys import make_world
from tests.evaluation.toy import write_suite
from tests.processes import METRO, run_python


def command(*arguments: object) -> str:
    """Run `metro ...` in a process of its own; what it prints."""
    return run_python(*METRO, *arguments).stdout


def scores_of(folder):
    return {path.name: path.read_text() for path in sorted(folder.rglob("*.jsonl*"))
            if "results" not in path.name}  # fmt: skip


def test_prepare_text_writes_what_the_command_writes(text, vocab, tmp_path, capsys):
    result = metro.prepare_text(
        inputs=[text], out=tmp_path / "a", vocab=vocab, num_workers=1, progress=False
    )
    flags = ["-i", text, "--out", tmp_path / "b", "--vocab", vocab, "--workers", 1]
    assert "documents; train" in command("prepare-text", *flags)
    assert files_of(result.folder) == files_of(tmp_path / "b")
    assert result.manifest["counts"]["vocab_size"] == 150
    assert capsys.readouterr() == ("", "")
    metro.prepare_text(inputs=[text], out=tmp_path / "a", vocab=vocab)
    shown = capsys.readouterr()
    assert shown.out == "" and "already finished" in shown.err


def test_prepare_prompts_writes_what_the_command_writes(tmp_path):
    world = make_world(tmp_path / "world", num_rows=12)
    common = {"mixture": world / "mix.yaml", "templates": world / "templates",
              "data_dir": world / "data", "limit": 5}  # fmt: skip
    result = metro.prepare_prompts(out=tmp_path / "a", datasets=["one"], progress=False, **common)
    flags = [x for name, value in common.items() for x in (f"--{name.replace('_', '-')}", value)]
    command("prepare-prompts", *flags, "--out", tmp_path / "b", "--dataset", "one")
    assert prompt_files_of(result.folder) == prompt_files_of(tmp_path / "b")
    assert list(result.manifest["splits"]["train"]) == ["one_ask", "one_random_order", "one_copy"]


def test_a_model_is_finetuned_and_answers(t5_folder, prepared, tmp_path, capsys):
    tuned = metro.finetune(
        model=t5_folder, data=prepared, output_dir=tmp_path / "tuned", max_steps=2, use_cpu=True,
        report_to="none", logging_steps=1, progress=False,
    )  # fmt: skip
    assert tuned.num_updates == 2 and tuned.metrics["loss"] > 0
    texts = ["a b c", "d e"]
    loaded = metro.load(tuned.folder)
    answers = metro.generate(loaded, texts, max_new_tokens=4, progress=False)
    assert capsys.readouterr() == ("", "")
    again = metro.generate(str(tuned.folder), texts, max_new_tokens=4, device="cpu")
    assert answers == again and len(answers) == 2
    printed = command("generate", tuned.folder, *texts, "--max-new-tokens", 4, "--device", "cpu")
    assert printed.splitlines() == [" ".join(answer.split()) for answer in answers]
    [several] = metro.generate(loaded, "a", num_beams=3, num_answers=3, max_new_tokens=4)
    assert len(several) == 3


@pytest.fixture(scope="module")
def model(golden):
    return str(golden / "hf_export/t5_prompt_tiny_f")


def test_a_model_is_evaluated_in_three_lines_and_the_table_is_at_hand(model, tmp_path, capsys):
    """Oracle: the command's run folder and its table."""
    suite = write_suite(tmp_path / "toys")
    evaluation = metro.evaluate(
        model, suite=suite, data_dir=suite.parent, out=tmp_path / "a", limit=8, device="cpu",
        progress=False,
    )  # fmt: skip
    assert capsys.readouterr() == ("", "")
    printed = command(
        "evaluate", model, "--suite", suite, "--data-dir", suite.parent, "--out", tmp_path / "b",
        "--limit", 8, "--device", "cpu", "--allow-missing",
    )  # fmt: skip
    assert printed == f"{evaluation.table}\n" == f"{evaluation}\n"
    other = tmp_path / "b" / evaluation.folder.name
    assert scores_of(evaluation.folder) == scores_of(other) != {}
    saved = json.loads((other / "summary.json").read_text())["tasks"]
    assert evaluation.accuracies == {name: task["mean"] for name, task in saved.items()}
    assert list(evaluation.missing) == ["gone"] and "nowhere" in evaluation.missing["gone"]
    for number in (f"{100 * evaluation.accuracies['truth']:.2f}", "<table>", "truth</td>"):
        assert number in evaluation._repr_html_()
    assert repr(evaluation) == str(evaluation)

    settings = EvaluationSettings(
        models=[model], suite=suite, data_dir=suite.parent, out=tmp_path / "a", limit=8,
        device="cpu",
    )  # fmt: skip
    resumed = metro.evaluate(settings)
    assert resumed.num_new == 0 and resumed.accuracies == evaluation.accuracies
    assert "nothing was computed" in capsys.readouterr().err

    report = metro.report(evaluation.folder, out=tmp_path / "report", published="none")
    assert report.paths[0] == tmp_path / "report" / "report.html" and report.paths[0].is_file()
    shown = report._repr_html_()  # of a notebook: the table, and the figure of the one suite
    assert "<table>" in shown and shown.count('<img alt="" src="data:image/svg+xml;base64,') == 1
    printed = command("report", other, "--out", tmp_path / "other", "--published", "none")
    assert printed.startswith(str(report))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metro.evaluate("a/b", suit="t0"), "unknown option 'suit'; did you mean 'suite'"),
        (lambda: metro.evaluate(EvaluationSettings(models=["a/b", "a/c"])), "takes one model"),
        (lambda: metro.finetune(model="a/b"), "missing: --data, --output-dir"),
        (lambda: metro.prepare_text(inputs=["a"], out="b"), "either vocab DIR or train_vocab N"),
        (lambda: metro.prepare_prompts(mixture="t0"), "out is missing"),
        (lambda: metro.generate("a/b", "text", top_p=0.5), "need sampling"),
        (lambda: metro.report("nowhere"), "nowhere is not a folder"),
    ],
)
def test_mistakes_are_user_errors(call, message):
    with pytest.raises(metro.UserError, match=message):
        call()


def test_public_names_exist_and_the_functions_can_be_called():
    import metro.evaluation.report.build
    import metro.fusion

    functions = "load generate evaluate finetune prepare_text prepare_prompts report fuse".split()
    assert all(callable(getattr(metro, name)) and name in dir(metro) for name in functions)
    assert all(getattr(metro, name) is not None for name in metro.__all__)
    assert metro.fuse is metro.fusion.fuse
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = metro.nothing
