"""Running a suite: what is written, when, and that nothing is lost or counted twice.

Oracles: a run that nothing disturbed, a plain evaluation of each prompt, and the files themselves.
"""

import json
import shutil
import unicodedata

import pytest
import torch

from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.runs.processes import join_processes
from metro.evaluation.runs.run_folder import check_run, read_run, refuse_another_model
from metro.evaluation.scoring.pair_scoring import NotFinite, PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier
from metro.evaluation.tasks.loading import load_task
from metro.evaluation.tasks.suites import read_suite
from metro.evaluation.tasks.task import Sources, choose_rows
from metro.utils.files import read_json
from metro.utils.identity import model_identity
from metro.utils.messages import UserError
from metro.utils.progress import Progress
from tests.data.prepared import Said
from tests.evaluation.golden import load_exported
from tests.evaluation.toy import run, write_suite

UNITS = [("colour", "plain"), ("colour", "again"), ("colour", "listed"), ("truth", "ask")]


@pytest.fixture(scope="module")
def loaded(golden):
    return load_exported(golden, "t5_prompt_tiny_f")


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, suite_file, loaded):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, suite_file, *loaded)
    return folder


def without_times(folder):
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "crc32")} for line in lines]


def all_scores(folder):
    return {
        str(path.relative_to(folder)): path.read_text() for path in folder.rglob("scores/*/*.jsonl")
    }


@pytest.mark.parametrize("method", ["direct", "channel", "flipped"])
def test_results_equal_a_plain_evaluation_of_each_prompt(tmp_path, suite_file, loaded, method):
    """Oracle: the classifier called on each prompt by itself."""
    run(tmp_path / "run", suite_file, *loaded, method=method)
    found = read_run(tmp_path / "run")
    assert [(r.task, r.prompt) for r in found.results] == UNITS
    suite = read_suite(suite_file)
    model, tokenizer = loaded
    encoder = PromptEncoder(tokenizer, max_target_length=512 if method == "channel" else 256)
    classifier = RankClassifier(PairScorer(model), encoder, method)
    for result in found.results:
        task = load_task(suite.tasks[result.task], Sources())
        examples = task.examples(result.prompt, flipped=method == "flipped").examples
        rankings = classifier.rank(examples)
        right = sum(r.prediction == e.label for r, e in zip(rankings, examples, strict=True))
        assert result.accuracy == right / len(examples)
        assert result.num_examples == len(examples)
        path = found.folder / result.scores_file
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line, ranking, example in zip(lines, rankings, examples, strict=True):
            assert line["scores"] == pytest.approx(ranking.scores, abs=1e-4)
            assert (line["index"], line["label"]) == (example.index, example.label)
            assert line["prediction"] == ranking.prediction


def test_chance_and_choices_are_of_the_rows(finished):
    """Oracle: by hand. Half of the rows have 2 options, half 3."""
    result = read_run(finished).results[0]
    assert result.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert result.median_choices == 2.5


class StopAfter(Progress):
    """Interrupts in the middle of the prompt after ``count`` finished ones."""

    def __init__(self, count):
        super().__init__(enabled=False)
        self.count = count

    def say(self, line):
        self.count -= " % of " in line

    def show(self, step, done, total=None, note=""):
        if self.count == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_stopped_run_goes_on_and_ends_as_if_never_stopped(
    tmp_path, suite_file, loaded, finished, count
):
    """Oracle: the undisturbed run, but for times."""
    folder = tmp_path / "run"
    if count == 0:
        folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(folder, suite_file, *loaded, progress=StopAfter(count))
    assert (folder / "run.json").exists() == bool(count)
    if count:
        assert len(read_run(folder).results) == count
    assert run(folder, suite_file, *loaded) == len(UNITS) - count
    assert without_times(folder) == without_times(finished)
    assert all_scores(folder) == all_scores(finished)
    assert run(folder, suite_file, *loaded) == 0


def test_prompts_that_render_alike_are_computed_once(suite_file, loaded):
    """Oracle: "plain" and "again" are one template; the second needs nothing new."""
    model, tokenizer = loaded
    task = load_task(read_suite(suite_file).tasks["colour"], Sources())
    scorer = PairScorer(model)
    classifier = RankClassifier(scorer, PromptEncoder(tokenizer))
    first = classifier.rank(task.examples("plain").examples)
    computed = len(scorer.known)
    assert classifier.rank(task.examples("again").examples) == first
    assert len(scorer.known) == computed > 0


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


def test_a_process_group_of_the_caller_stays(monkeypatch, tmp_path):
    """Oracle: torch, asked before and after; a group that was made here is destroyed."""
    for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    group = torch.distributed
    store = group.FileStore(str(tmp_path / "store"), 1)
    group.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        join_processes("cpu").close()
        assert group.is_initialized()
    finally:
        group.destroy_process_group()
    made = lambda backend: real("gloo", store=store, rank=0, world_size=1)  # noqa: E731
    real, store = group.init_process_group, group.FileStore(str(tmp_path / "other"), 1)
    monkeypatch.setattr(group, "init_process_group", made)
    processes = join_processes("cpu")
    assert group.is_initialized()
    processes.close()
    assert not group.is_initialized()


def test_another_model_at_the_same_place_is_refused(finished, suite_file, golden):
    """Oracle: other weights under the name of the first; another dtype changes weights as well,
    but is what the message names."""
    with pytest.raises(ValueError, match="holds a run of other weights of toy") as error:
        run(finished, suite_file, *load_exported(golden, "metro_tiny_a"))
    assert "\n" not in str(error.value)
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    with pytest.raises(ValueError, match="options: dtype 'float32', this one has 'bfloat16'"):
        run(finished, suite_file, model.bfloat16(), tokenizer)


def test_rows_that_cannot_be_asked_are_left_out_and_counted(tmp_path, loaded):
    """Oracle: by hand: one row without answer, one with an empty option, one whose options are all
    alike; of three good ones one has two options alike."""
    suite_file = write_suite(tmp_path)
    rows = [
        {"thing": "a", "colours": ["red", "blue"], "answer": 0},
        {"thing": "b", "colours": ["red", ""], "answer": 0},
        {"thing": "c", "colours": ["red", "red", "blue"], "answer": 1},
        {"thing": "d", "colours": ["red", "blue"], "answer": 7},
        {"thing": "e", "colours": ["red", "blue"], "answer": 1},
        {"thing": "f", "colours": ["red", "red"], "answer": 1},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "colour.jsonl").write_text(text)
    said = Said()
    run(tmp_path / "run", suite_file, *loaded, progress=said)
    result = read_run(tmp_path / "run").results[0]
    assert result.num_examples == 3
    assert without_times(tmp_path / "run")[0]["skipped"] == 3
    why = "empty answer choice (first: row 1: ['red', ''])"
    assert f"colour / plain: 1 of 6 rows left out: {why}" in said.lines
    note = "1 row with duplicate answer choices; duplicates count as one choice"
    assert f"colour / plain: {note}" in said.lines
    scores = [json.loads(line) for line in (tmp_path / "run" / result.scores_file).open()]
    assert [score["index"] for score in scores] == [0, 2, 4]
    assert scores[1]["prediction"] != 1 and scores[1]["label"] == 0


def test_a_prompt_that_cannot_be_evaluated_is_left_out_and_named(tmp_path, loaded):
    """Oracle: the other three prompts, one before and two after it; the reason."""
    suite_file = write_suite(tmp_path)
    text = suite_file.read_text()
    suite_file.write_text(text.replace("answer_choices[answer]}}", "answer_choices[9]}}", 1))
    said = Said()
    assert run(tmp_path / "run", suite_file, *loaded, progress=said) == 2
    for prompt in ("plain", "again"):
        reason = f"colour / {prompt}: left out: no row can be evaluated: label out of range"
        assert any(line.startswith(reason) for line in said.lines)
    found = [(result.task, result.prompt) for result in read_run(tmp_path / "run").results]
    assert found == [("colour", "listed"), ("truth", "ask")]


@pytest.mark.parametrize("rank", [0, 1])
def test_scores_that_are_not_finite_end_the_run(tmp_path, suite_file, golden, rank):
    """Oracle: the message names the prompt; no result and no NaN is written."""
    model, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    content = model_identity(model, tokenizer)
    norm = model.decoder.block[0].layer[rank].layer_norm.weight
    with torch.no_grad():
        norm.fill_(float("nan") if rank else float("inf"))
    with pytest.raises(NotFinite, match="log-probability of an answer choice of colour / plain is"):
        run(tmp_path / "run", suite_file, model, tokenizer, content=content)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the weight decoder.block.0.layer.*not finite"):
        model_identity(model, tokenizer)


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


def test_long_options_are_cut_with_a_note(tmp_path, loaded):
    """Oracle: an option of 300 words against a limit of 256 tokens."""
    suite_file = write_suite(tmp_path)
    row = {"thing": "a", "colours": ["red " * 300, "blue"], "answer": 1}
    (tmp_path / "colour.jsonl").write_text(json.dumps(row) + "\n")
    said = Said()
    run(tmp_path / "run", suite_file, *loaded, progress=said)
    assert any("1 answer choice cut at 256 tokens" in note for note in said.lines)


@pytest.mark.parametrize("method", ["direct", "flipped"])
def test_long_prompts_are_cut_with_a_note(tmp_path, loaded, method):
    """Oracle: three rows are longer than 512 tokens; what stands at their end is lost. One of them
    is cut by the template, too."""
    suite_file = write_suite(tmp_path)
    things = ["so " * 600 + "red", "so " * 600 + "blue", "so " * 900, "grass"]
    rows = [{"thing": thing, "colours": ["red", "blue"], "answer": 0} for thing in things]
    (tmp_path / "colour.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for side, lost in (("right", "end"), ("left", "beginning")):
        said, folder = Said(), tmp_path / side
        run(folder, suite_file, *loaded, method=method, progress=said, truncation_side=side)
        number = 3 if method == "direct" else 6  # with each answer choice
        note = f"colour / plain: {number} sources cut at 512 tokens, losing the {lost}"
        assert any(line.startswith(note) for line in said.lines)
        note = "colour / plain: 1 row with a value cut at 2048 characters, as published"
        assert note in said.lines
        result = without_times(folder)[0]
        assert (result["cut_sources"], result["cut_targets"]) == (number, 0)
        scores = (folder / result["scores_file"]).read_text().splitlines()
        found[side] = [json.loads(line)["scores"] for line in scores]
    assert (found["right"][0] == found["right"][1]) and (found["left"][0] != found["left"][1])
    with pytest.raises(ValueError, match="truncation_side 'left', this one has 'right'"):
        run(tmp_path / "left", suite_file, *loaded, method=method)


def test_rows_are_chosen_evenly_and_repeatably():
    """Oracle: by hand."""
    assert choose_rows(10, None, None) == list(range(10))
    assert choose_rows(10, None, 4) == [0, 2, 5, 7]
    sample = choose_rows(5000, 1000, None)
    assert len(set(sample)) == 1000
    assert sample == sorted(sample) == choose_rows(5000, 1000, None)


def test_options_of_equal_tokens_are_noted(tmp_path, loaded):
    """Oracle: an uncased vocabulary cannot tell "Red" from "red"."""
    suite_file = write_suite(tmp_path)
    row = {"thing": "a", "colours": ["Red", "red"], "answer": 1}
    (tmp_path / "colour.jsonl").write_text(json.dumps(row) + "\n")
    said = Said()
    run(tmp_path / "run", suite_file, *loaded, progress=said)
    note = "1 row with different answer choices of equal tokens;"
    assert any(note in text for text in said.lines)
    assert read_run(tmp_path / "run").results[0].accuracy == 0.0
