"""Minimal pairs: what each kind of model is asked, ties, and both layouts of BLiMP's files.

Oracles: sums of log-probabilities computed one question at a time, and cases by hand.
"""

import json

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

import metro
from metro.cli.main import app
from metro.conversion.fairseq_to_hf import to_hf
from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.evaluate import evaluate_models
from metro.evaluation.report.build import build_sections
from metro.evaluation.runs.run_folder import read_run
from metro.evaluation.scoring.minimal_pairs import (
    PairRanker,
    RtdScorer,
    measure_pairs,
    question_of,
    word_starts,
)
from metro.evaluation.scoring.pair_scoring import PairScorer
from metro.evaluation.settings import EvaluationSettings
from metro.evaluation.tasks.examples import EvaluationExample
from metro.evaluation.tasks.loading import load_task
from metro.evaluation.tasks.suites import TaskSpec, find_suite
from metro.evaluation.tasks.task import Sources
from metro.models.pretraining_model import load_pretraining_model, load_rtd_head
from metro.utils.messages import UserError
from metro.utils.progress import SILENT
from tests.evaluation.golden import score_alone
from tests.finetuning.conftest import small_model

SENTENCES = ("The cats sleep.", "The cats sleeps, as they said.")


@pytest.fixture(scope="module")
def checkpoint(golden):
    """Path of a recorded checkpoint by its name."""
    return lambda name: golden / f"checkpoints/{name}.pt"


@pytest.fixture(scope="module")
def load(checkpoint, golden):
    return lambda name: metro.load(checkpoint(name), vocab=golden / "tiny_vocab")


def rank(loaded, question, scorer=None, sentences=SENTENCES):
    model, tokenizer = loaded
    ranker = PairRanker(
        scorer or PairScorer(model), PromptEncoder(tokenizer), question, model.config
    )
    return ranker.rank([EvaluationExample(0, "", sentences, 0)])[0]


@pytest.mark.parametrize(
    "pieces, starts",
    [
        (["▁the", "▁cat", "s", "▁sleep", "."], [0, 1, 3, 4]),
        (["▁can", "'", "t", "▁.", "▁", "x", "!", "?"], [0, 3, 4, 6]),
        (["a", "b", "Ġc"], [0, 2]),
    ],
)
def test_words_are_hidden_whole_and_punctuation_by_itself(pieces, starts):
    """Oracle: by hand."""
    assert word_starts(pieces) == starts


def test_models_are_asked_what_they_were_pretrained_on(load, tmp_path):
    asked = {
        name: question_of(*load(name)) for name in ("metro_tiny_a", "t5_tiny_c", "t5_prompt_tiny_f")
    }
    assert asked == {
        "metro_tiny_a": "restore",
        "t5_tiny_c": "blanks",
        "t5_prompt_tiny_f": "restore",
    }


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_any_other_model_is_asked_by_its_sentinels_or_lack_of_them(kind):
    """Oracle: ids written by hand: <extra_id_0> 0, <extra_id_1> 1, </s> 2, the words 3, 4, 5."""
    words = {"</s>": 2, "▁a": 3, "▁b": 4, "c": 5}
    if kind == "t5":
        words |= {"<extra_id_0>": 0, "<extra_id_1>": 1}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="c"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    plain.add_special_tokens([word for word in words if word[0] == "<"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    model = small_model(kind)
    question = question_of(model, tokenizer)
    ranker = PairRanker(PairScorer(model), PromptEncoder(tokenizer), question, model.config)
    first, second = ranker.questions(["a b", "b"])
    if kind == "t5":
        assert question == "blanks"
        assert first == [((0, 4, 2), (0, 3, 1)), ((3, 0, 2), (0, 4, 1))]
        assert second == [((0, 2), (0, 4, 1))]
    else:
        assert question == "restore"
        assert first == [((3, 4, 2), (3, 4, 2))]
    [ranking] = ranker.rank([EvaluationExample(0, "", ("a b", "b"), 0)])
    expected = [sum(score_alone(model, pair) for pair in asked) for asked in (first, second)]
    assert ranking.scores == pytest.approx(expected, abs=1e-4)


def test_blanks_sum_over_words_hidden_one_by_one(load):
    """Oracle: spans cut by hand, each scored alone with all logits."""
    loaded = model, tokenizer = load("t5_tiny_c")
    expected = []
    for sentence in SENTENCES:
        pieces = tokenizer.tokenize(sentence)
        words = [[]]
        for piece in pieces:
            if piece.startswith("▁") and words[-1]:
                words.append([])
            words[-1].append(piece)
        total, ids = 0.0, tokenizer.convert_tokens_to_ids
        for number, word in enumerate(words):
            hidden = [w if n != number else ["<sen001>"] for n, w in enumerate(words)]
            source = ids(["<s>", *sum(hidden, []), "</s>"])
            total += score_alone(model, (source, ids(["<sen001>", *word, "<sen000>"])))
        expected.append(total)
    found = rank(loaded, "blanks")
    assert found.scores == pytest.approx(expected, abs=1e-3)
    assert found.prediction == expected.index(max(expected))


@pytest.mark.parametrize("name, skipped", [("metro_tiny_a", 0), ("t5_prompt_tiny_f", 1)])
@pytest.mark.parametrize("sentences", [("The cat.", "A cat."), SENTENCES], ids=["equal", "other"])
def test_restoring_judges_both_sentences_by_the_same_inputs(load, name, skipped, sentences):
    """Oracle: scores computed alone: of both inputs if they have equally many tokens, else of each
    sentence given itself. METRO's pretraining decodes ``<s>`` too.
    """
    loaded = model, tokenizer = load(name)
    ids = [tokenizer(sentence)["input_ids"] for sentence in sentences]
    is_replacement = sentences is not SENTENCES
    assert (len(ids[0]) == len(ids[1])) == is_replacement
    expected = [
        sum(
            score_alone(model, (s, target[skipped:])) for s in (ids if is_replacement else [target])
        )
        for target in ids
    ]
    found = rank(loaded, "restore", sentences=sentences)
    assert found.scores == pytest.approx(expected, abs=1e-3)


def test_rtd_sums_the_log_probabilities_of_no_replacement(load, checkpoint):
    """Oracle: the pretraining model's own encoder and head, one sentence at a time."""
    loaded = model, tokenizer = load("metro_tiny_a")
    whole = load_pretraining_model(checkpoint("metro_tiny_a"))
    expected = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        logits = whole.rtd_head(whole.main.encoder(ids).last_hidden_state).squeeze(-1)
        expected.append(F.logsigmoid(-logits).sum().item())
    scorer = RtdScorer(model, load_rtd_head(checkpoint("metro_tiny_a")), batch_tokens=20)
    assert rank(loaded, "rtd", scorer).scores == pytest.approx(expected, abs=1e-4)


def test_sentences_of_the_same_tokens_are_tied_and_a_tie_counts_half(load):
    found = rank(load("metro_tiny_a"), "restore", sentences=("The cat.", "the  CAT ."))
    assert found.scores[0] == found.scores[1] and found.prediction is None
    assert measure_pairs([0, None, 1, 0])[:3] == (0.625, None, 0.5)


def test_kept_heads_are_those_of_the_checkpoint(checkpoint, golden, tmp_path):
    """Oracle: the checkpoint itself; an export without them, and plain T5, have none."""
    vocab = golden / "tiny_vocab"
    to_hf(checkpoint("metro_tiny_a"), tmp_path / "kept", vocab=vocab, keep_auxiliary=True)
    to_hf(checkpoint("metro_tiny_a"), tmp_path / "bare", vocab=vocab)
    kept = load_pretraining_model(tmp_path / "kept").state_dict()
    original = load_pretraining_model(checkpoint("metro_tiny_a")).state_dict()
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)
    assert load_rtd_head(tmp_path / "bare") is None
    assert load_rtd_head(checkpoint("t5_tiny_c")) is None


def test_blimp_has_the_67_paradigms_of_12_phenomena_of_its_paper():
    suite = find_suite("blimp")
    paradigms = [name for task in suite.tasks.values() for name in task.prompts]
    assert len(suite.tasks) == 12 and len(set(paradigms)) == len(paradigms) == 67


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two paradigms in the repository's layout and one in the hub's, with its further fields."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"sentence_good": f"The {n} cats sleep.", "sentence_bad": f"The {n} cats sleeps."}
        for n in range(5)
    ]
    tied = {
        "sentence_good": "Who slept?",
        "sentence_bad": "who slept ?",
        "UID": "x",
        "pair_id": "5",
    }
    places = ["ellipsis_n_bar_1.jsonl", "ellipsis_n_bar_2/train.jsonl", "causative.jsonl"]
    for name in places:
        path = folder / "blimp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, tied]))
    return folder


def test_decoder_and_kept_head_are_evaluated_and_named(checkpoint, golden, pairs, tmp_path):
    """Oracle: the score files; the average is over the paradigms that are there, the others are
    named."""
    settings = EvaluationSettings(
        models=[str(checkpoint("metro_tiny_a"))], suite="blimp", data_dir=pairs,
        vocab=golden / "tiny_vocab", out=tmp_path,
    )  # fmt: skip
    decoder, rtd = evaluate_models(settings, SILENT)
    assert [e.folder.name.split("-")[1] for e in (decoder, rtd)] == ["decoder", "rtd"]
    for evaluation, words in ((decoder, "decoder (restore)"), (rtd, "by rtd")):
        summary = evaluation.summary
        assert words in str(evaluation.table) and summary.average_chance == 0.5
        assert summary.averaged == list(summary.tasks) == ["argument_structure", "ellipsis"]
        assert "mean of 3 of 67 paradigms" in str(evaluation.table)
        run = read_run(evaluation.folder)
        for result in run.results:
            text = (run.folder / result.scores_file).read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            assert [line["prediction"] for line in lines][-1] is None
            right = [
                0.5 if s[0] == s[1] else float(s[0] > s[1])
                for s in (line["scores"] for line in lines)
            ]
            accuracy = summary.tasks[result.task].accuracies[result.prompt]
            assert accuracy == pytest.approx(sum(right) / 6)
        assert len(evaluation.missing) == 10 + 8
    assert not any(
        "runs differ" in note for note in build_sections([decoder.folder, rtd.folder])[0].notes
    )
    assert decoder.missing["binding"] and decoder.missing["argument_structure / inchoative"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "direct"}, "the methods of suite blimp are decoder, rtd"),
        ({"method": "rtd"}, "has no head of replaced token detection"),
        ({"normalization": "mean"}, "minimal pairs are scored by their sum"),
        ({"suite": "t0", "method": "rtd"}, "the methods of suite t0 are direct"),
    ],
)
def test_methods_that_do_not_apply_are_refused(
    checkpoint, golden, pairs, tmp_path, options, message
):
    options = {"suite": "blimp", "data_dir": pairs, "out": tmp_path, **options}
    with pytest.raises(UserError, match=message):
        metro.evaluate(str(checkpoint("t5_tiny_c")), vocab=golden / "tiny_vocab", **options)


def test_paradigms_without_rows_are_left_out_for_one_reason(checkpoint, golden, pairs, tmp_path):
    """Oracle: 67 paradigms less the three that are there; of binding none, which is one task."""
    done = CliRunner().invoke(
        app,
        ["evaluate", str(checkpoint("t5_tiny_c")), "--suite", "blimp", "--data-dir", str(pairs)]
        + ["--vocab", str(golden / "tiny_vocab"), "--out", str(tmp_path), "--device", "cpu"],
    )
    assert done.exit_code == 3
    _, _, listed = done.output.partition("left out, 18 tasks or prompts:\n")
    assert done.output.count(f"{pairs}/blimp has no PARADIGM.jsonl (or ") == 1
    names, _, _ = listed.partition(": ")
    assert {"binding", "argument_structure / inchoative"} < {*names.strip().split(", ")}


def test_names_of_paradigms_stay_in_the_folder_of_the_data(tmp_path):
    """Oracle: rows beside the folder, which a suite of somebody else names."""
    pair = {"sentence_good": "a b", "sentence_bad": "b a"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/r.jsonl").write_text(json.dumps(pair))
    (tmp_path / "data").mkdir()
    spec = TaskSpec("a", "minimal_pairs", ("r",), "../mine", split="train")
    with pytest.raises(UserError, match="'../mine' leads out of"):
        load_task(spec, Sources(tmp_path / "data"))


def test_rows_of_another_kind_are_refused_by_name(checkpoint, golden, tmp_path):
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp/causative.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match="sentence_good and sentence_bad"):
        metro.evaluate(
            str(checkpoint("t5_tiny_c")), vocab=golden / "tiny_vocab", suite="blimp",
            data_dir=tmp_path, out=tmp_path / "out",
        )  # fmt: skip
