"""Running a suite: what is written, when, and that nothing is lost or counted twice.

Oracles: a run that nothing disturbed, and a plain evaluation of each prompt.
"""

import json

import pytest
import torch

from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.runs.run_folder import read_run
from metro.evaluation.scoring.pair_scoring import NotFinite, PairScorer
from metro.evaluation.scoring.rank_classification import RankClassifier
from metro.evaluation.tasks.loading import load_task
from metro.evaluation.tasks.suites import read_suite
from metro.evaluation.tasks.task import Sources
from metro.utils.identity import model_identity
from metro.utils.messages import UserError
from metro.utils.progress import Progress
from tests.evaluation.golden import load_exported
from tests.evaluation.toy import run, without_times

UNITS = [("colour", "plain"), ("colour", "again"), ("colour", "listed"), ("truth", "ask")]


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
