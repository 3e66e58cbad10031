"""A run's folder: no other run, model or data; nothing damaged; a file per name.

Oracles: a run that nothing disturbed, and the files themselves.
"""

import json
import shutil
import unicodedata

import pytest
import torch

from metro.evaluation.runs.run_folder import check_run, read_run, refuse_another_model
from metro.utils.files import read_json
from metro.utils.messages import UserError
from tests.evaluation.golden import load_exported
from tests.evaluation.toy import run, without_times, write_suite


def test_another_run_in_the_same_folder_is_refused(finished, suite_file, loaded, tmp_path):
    """Oracle: the message names what differs; the folder stays as it was."""
    folder = finished
    before = without_times(folder)
    with pytest.raises(ValueError, match="method 'direct', this one has 'channel'"):
        run(folder, suite_file, *loaded, method="channel")
    with pytest.raises(ValueError, match="options: limit None, this one has 5"):
        run(folder, suite_file, *loaded, limit=5)
    assert without_times(folder) == before
    for content in ("{", "[1]", "3"):
        spoilt = tmp_path / f"spoilt{len(content)}{content[-1]}"
        spoilt.mkdir()
        (spoilt / "run.json").write_text(content)
        with pytest.raises(ValueError, match="run.json is (corrupt; delete|not the JSON)"):
            run(spoilt, suite_file, *loaded)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and has no run.json"):
        run(other, suite_file, *loaded)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_changed_digit_in_a_run_is_named_by_whoever_reads_it(
    finished, suite_file, loaded, tmp_path
):
    """Oracle: by hand: the file, and whether the evaluation itself reads it."""
    folder = shutil.copytree(finished, tmp_path / "run")
    [scores, *_] = sorted(folder.glob("scores/*/*.jsonl"))
    for path, is_read in (("run.json", True), ("results.jsonl", True), (scores, False)):
        path = folder / path
        content = path.read_text()
        digit = content.index("0." if path != folder / "run.json" else '"format": 3') + 10
        place = next(i for i in range(digit, len(content)) if content[i] in "1234567")
        path.write_text(f"{content[:place]}{int(content[place]) ^ 1}{content[place + 1 :]}")
        with pytest.raises(UserError, match=f"{path.name}.* was damaged"):
            check_run(folder)
        if is_read:
            with pytest.raises(UserError, match=f"{path.name}.* was damaged"):
                run(folder, suite_file, *loaded)
        path.write_text(content)
    check_run(folder)


def test_what_a_finished_prompt_reads_is_compared_by_content(
    finished, suite_file, loaded, tmp_path
):
    """Oracle: by hand. Other tasks and folders do not matter, another template or row does, and a
    prompt that is gone, each on the same names."""
    folder = shutil.copytree(finished, tmp_path / "run")
    moved = shutil.copytree(suite_file.parent, tmp_path / "moved") / "toys.yaml"
    assert run(folder, moved, *loaded, bigbench_dir=tmp_path) == 0
    text = moved.read_text()
    more = '  more:\n    data: truth.jsonl\n    prompts: {ask: {jinja: "{{text}} ||| {{answer_'
    moved.write_text(text + more + 'choices[label]}}", answer_choices: yes ||| no}}\n')
    assert run(folder, moved, *loaded) == 1
    for old, new, message in [
        ("Is it true that", "Is it so that", "other data of task truth.*prompt 'ask' were changed"),
        ("answer_choices: yes ||| no", "answer_choices: no ||| yes", "data of task truth"),
        ("listed:", "another:", "results of task colour, prompt 'listed', which suite toys does"),
    ]:
        moved.write_text(text.replace(old, new) + more + 'choices[label]}}", answer_choices: a}}')
        with pytest.raises(UserError, match=message):
            run(folder, moved, *loaded)
    moved.write_text(text)
    with pytest.raises(UserError, match="results of task more, prompt 'ask', which suite toys"):
        run(folder, moved, *loaded)


def test_a_run_of_an_earlier_version_is_refused_with_the_true_reason(
    finished, suite_file, loaded, tmp_path
):
    """Oracle: run.json as earlier versions wrote it, with another digest of the same suite."""
    folder = shutil.copytree(finished, tmp_path / "run")
    info = read_json(folder / "run.json")
    del info["format"], info["data"]
    info["suite_content"] = "0" * 16
    (folder / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="by an earlier version of METRO that makes other examples"):
        run(folder, suite_file, *loaded)


def test_other_rows_of_a_task_are_refused_and_rows_that_are_missing_are_not(tmp_path, loaded):
    """Oracle: the message names the task; run.json keeps the digests of all that was there."""
    suite_file, folder = write_suite(tmp_path), tmp_path / "run"
    rows = tmp_path / "truth.jsonl"
    text = rows.read_text()
    run(folder, suite_file, *loaded)
    whole = json.loads((folder / "run.json").read_text())
    assert {task: set(prompts) for task, prompts in whole["data"].items()} == {
        "colour": {"plain", "again", "listed"},
        "truth": {"ask"},
    }
    (tmp_path / "elsewhere").mkdir()
    rows.rename(tmp_path / "elsewhere/truth.jsonl")
    assert run(folder, suite_file, *loaded, missing_tasks=["truth", "gone"]) == 0
    rows.write_text(text.replace("3 is 3", "3 is 5"))
    with pytest.raises(UserError, match="on other data of task truth: its rows or the template"):
        run(folder, suite_file, *loaded)
    rows.write_text(text)
    assert run(folder, suite_file, *loaded) == 0
    assert json.loads((folder / "run.json").read_text()) == whole


@pytest.mark.parametrize("part", ["weights", "configuration", "tokenizer"])
def test_another_model_under_the_same_name_is_refused(finished, suite_file, loaded, part, golden):
    """Oracle: a single number, a setting or a token that differs."""
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    assert run(finished, suite_file, model, tokenizer) == 0
    if part == "weights":
        with torch.no_grad():
            model.shared.weight[300, 7] += 0.01
    elif part == "configuration":
        model.config.layer_norm_eps = 0.5
    else:
        tokenizer.add_tokens(["thing"])
    with pytest.raises(UserError, match=f"holds a run of other {part} of toy: it was trained on"):
        run(finished, suite_file, model, tokenizer)


def test_a_model_beside_the_one_of_a_run_is_refused_before_it_is_loaded(tmp_path):
    """Oracle: by hand: two folders, a link to one of them, and one that has gone since."""
    for name in ("a/model", "b/model", "run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/model")
    place = str(tmp_path / "a/model")
    (tmp_path / "run/run.json").write_text(json.dumps({"place": place}))
    refuse_another_model(tmp_path / "run", place)
    refuse_another_model(tmp_path / "run", str(tmp_path / "link"))
    refuse_another_model(tmp_path / "none", place)
    for other in (str(tmp_path / "b/model"), "metro_t0_base"):
        with pytest.raises(UserError, match=f"run of the model {place}, and {other} is another"):
            refuse_another_model(tmp_path / "run", other)
    (tmp_path / "a/model").rmdir()
    refuse_another_model(tmp_path / "run", str(tmp_path / "b/model"))


def test_results_that_are_not_utf8_are_named(finished, tmp_path):
    """Oracle: the message."""
    folder = shutil.copytree(finished, tmp_path / "run")
    with (folder / "results.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    with pytest.raises(UserError, match="results.jsonl is corrupt .'utf-8' codec"):
        read_run(folder)


def test_another_model_at_the_same_place_is_refused(finished, suite_file, golden):
    """Oracle: other weights under the name of the first; another dtype changes weights as well,
    but is what the message names."""
    with pytest.raises(ValueError, match="holds a run of other weights of toy") as error:
        run(finished, suite_file, *load_exported(golden, "metro_tiny_a"))
    assert "\n" not in str(error.value)
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    with pytest.raises(ValueError, match="options: dtype 'float32', this one has 'bfloat16'"):
        run(finished, suite_file, model.bfloat16(), tokenizer)


HARD_NAMES = [
    *("颜色", "形状", "épreuve", "e\u0301preuve", "Ask", "ask", "a/b", "a_b", "a b", ".."),
    *("x" * 300, "x" * 299 + "y", "名" * 120, "con", "a\nb", "🙂", "🙃"),
]


def test_no_two_names_share_a_file(tmp_path, loaded):
    """Oracle: as many score files as (task, prompt), on disks that ignore case or fold accents
    too, and what was computed under each name."""
    prompt = {"jinja": "{{text}}? ||| {{answer_choices[label]}}", "answer_choices": "yes ||| no"}
    tasks = {
        name: {"data": f"{number}.jsonl", "prompts": {"plain": prompt}}
        for number, name in enumerate(HARD_NAMES)
    }
    tasks["last"] = {"data": "0.jsonl", "prompts": dict.fromkeys(HARD_NAMES, prompt)}
    for number in range(len(HARD_NAMES)):
        row = json.dumps({"text": f"{number} is", "label": 0}) + "\n"
        (tmp_path / f"{number}.jsonl").write_text(row * (number + 1))
    (tmp_path / "toys.yaml").write_text(json.dumps({"tasks": tasks}, ensure_ascii=False))
    run(tmp_path / "run", tmp_path / "toys.yaml", *loaded)
    files = [p.relative_to(tmp_path / "run") for p in (tmp_path / "run/scores").rglob("*.jsonl")]
    folded = {unicodedata.normalize("NFC", str(path).casefold()) for path in files}
    assert len(folded) == len(files) == 2 * len(HARD_NAMES)
    assert all(len(path.parts) == 3 for path in files)
    found = read_run(tmp_path / "run")
    for number, result in enumerate(found.results[: len(HARD_NAMES)]):
        assert result.task == HARD_NAMES[number]
        assert len(found.scores(result)) == result.num_examples == number + 1
