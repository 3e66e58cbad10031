"""What the demonstration shows and measures, on a model whose answers are known beforehand."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.initialization import Initialization, initialize
from metro.pretraining.model import MetroPretrainingModel
from scripts.demo_probe import Answer, Planted, Probe, Scores, bigram_bits

WORDS = [f"▁w{chr(97 + i)}" for i in range(20)]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "[MASK]", *WORDS, "ing", "▁,", "<sen000>"]
PAIRS = {5: 6, 7: 8, 9: 10}  # a word and its usual follower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text in which each of PAIRS is frequent."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, num_sentences in (("train", 400), ("valid", 200)):
        sentences = []
        for _ in range(num_sentences):
            starts = random.choice([*PAIRS, *range(11, 25)], 10)
            words = [t for start in starts for t in (start, PAIRS.get(start, 26))]
            sentences += [*words, 2]
        np.array(sentences, np.uint16).tofile(folder / f"{split}.bin")
    manifest = {"reference_bits": {"unigram": 4.5, "bigram": 2.5}}
    (folder / "prepare_text.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def probe(folder) -> Probe:
    """An untrained model that copies."""
    config = MetroT5Config(
        *(len(PIECES), 64, 16, 64, 2, 2, 4), max_positions=64, decoder_start_token_id=27
    )
    torch.manual_seed(1)
    model = MetroPretrainingModel(config, MetroPretrainingConfig(1)).eval()
    initialize(model, Initialization(0.1, 0.1, copy_gain=3.0))
    return Probe(model, PIECES, folder)


def test_only_whole_words_are_planted(probe):
    """Oracle: the pieces; "ing" and the comma are no words, nor is a word before "ing"."""
    texts = np.tile(np.array([0, 5, 25, 5, 26, 6, 7, 2]), (500, 1))
    planted = probe.plant(texts)
    assert (planted.original == texts).all()
    share = planted.is_planted.mean(0)
    assert share[[0, 1, 2, 4, 7]].tolist() == [0] * 5
    assert all(0.04 < share[t] < 0.15 for t in (3, 5, 6))
    assert np.isin(planted.corrupted[planted.is_planted], np.arange(5, 25)).all()


def test_scores_of_an_untrained_model_that_copies(probe):
    """Oracle: its RTD head is zero everywhere, its auxiliary model knows no more than chance."""
    threshold = probe.threshold()
    assert threshold == 0
    scores = probe.score(threshold, bigram_bits=2.5)
    assert scores.auxiliary_bits == pytest.approx(math.log2(len(PIECES)), abs=1.0)
    assert (scores.recall, scores.false_alarms, scores.restored) == (0, 0, 0)
    assert scores.copied > 80
    assert list(scores.gate.values()) == [False, False, False]


def test_marks_are_counted_as_by_hand(probe, monkeypatch):
    """Oracle: by hand. Of 8 tokens 3 are planted; 2 of them and 2 others are marked, one of which
    is `<s>`; one of the 2 is restored, and 4 of the 5 others are copied."""
    original = np.array([[0, 5, 6, 7], [0, 8, 9, 10]])
    corrupted = np.array([[0, 11, 6, 7], [0, 12, 13, 10]])
    logits = np.array([[1.0, 1, 1, -1], [-1, 1, -1, -1]])
    best = np.array([[0, 11, 6, 8], [0, 12, 13, 10]])
    best_other = np.array([[9, 5, 9, 9], [9, 9, 9, 9]])
    monkeypatch.setattr(probe, "plant", lambda texts: Planted(original, corrupted))
    monkeypatch.setattr(probe, "ask", lambda texts: Answer(logits, best, best_other))
    scores = probe.score(0.0, 2.5)
    assert scores.recall == pytest.approx(100 * 2 / 3)
    assert scores.false_alarms == pytest.approx(100 * 2 / 5)
    assert scores.precision == 50
    assert (scores.restored, scores.copied) == (50, 80)
    silent = Answer(logits - 9, best, best_other)
    monkeypatch.setattr(probe, "ask", lambda texts: silent)
    assert probe.score(0.0, 2.5).precision == 0


def test_words_alone_are_masked(probe, monkeypatch):
    """Oracle: the ids below 4, of which <s> and </s> would be found too easily."""
    masked = []

    def fill(texts, positions):
        masked.append(np.take_along_axis(texts, positions, 1))
        return torch.zeros(*positions.shape, len(PIECES)).log_softmax(-1)

    monkeypatch.setattr(probe, "fill", fill)
    probe.score(0.0, 2.5)
    assert masked[0].min() >= 4


def test_what_is_measured_sets_no_threshold(probe, folder):
    """Oracle: the two halves of the text, changed about."""
    swapped = Probe(probe.model, PIECES, folder, half=0)
    assert not np.array_equal(probe.measured, probe.other)
    assert np.array_equal(swapped.measured, probe.other)
    assert np.array_equal(swapped.other, probe.measured)


def test_a_bigram_restores_what_usually_follows(probe):
    """Oracle: with every token marked, planted followers of PAIRS are restored by counting."""
    scores = probe.score(-1.0, 2.5)
    assert scores.recall == scores.false_alarms == 100
    assert 5 < scores.restored_by_bigram < 60
    followers = probe.followers()
    assert all(followers[word].argmax() == follower for word, follower in PAIRS.items())


def test_gate_is_open_for_scores_that_reach_it():
    scores = Scores(5.0, 6.0, 21.0, 4.9, 12.0, 10.0, 99.0, 30.0)
    assert list(scores.gate.values()) == [True] * 3
    assert not any(Scores(6.0, 6.0, 20.0, 4.9, 10.0, 10.0, 99.0, 30.0).gate.values())


def test_sentences_are_shown_with_blanks_marks_and_corrections(probe):
    console = Console(file=io.StringIO(), width=200)
    probe.show(-1.0, console)  # everything is marked
    shown = console.file.getvalue()
    assert shown.count("____") == shown.count("  filled ") == 3
    assert shown.count("  marked ") == shown.count("  decoder") == 3
    for line in shown.splitlines():
        assert not line.startswith("  planted") or line.count("(was:") >= 2
    marked = next(line for line in shown.splitlines() if line.startswith("  marked "))
    assert all(word[0] == "[" and word[-1] == "]" for word in marked.split()[1:])


def test_reference_line_is_that_of_prepare_text(probe, tmp_path):
    (tmp_path / "prepare_text.json").write_text('{"reference_bits": {"bigram": 2.5}}')
    assert bigram_bits(tmp_path) == 2.5
