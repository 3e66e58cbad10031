"""METRO in lm-evaluation-harness, the real package on a task of local rows.

Oracle, unless a test says otherwise: `metro.Ranker` on the same rows.
"""

import json

import pytest
import torch

from metro.ranking.ranker import Ranker
from tests.ranking.conftest import MAILS, OPTIONS

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra lm-eval")

pytestmark = pytest.mark.slow  # the harness alone takes ten seconds to import

TEMPLATE = "What is this mail? {{body}}"


@pytest.fixture(scope="module")
def model(golden):
    return str(golden / "hf_export/metro_tiny_a")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    rows = [{**row, "right": OPTIONS.index(row["label"])} for row in MAILS]
    path = tmp_path_factory.mktemp("mails") / "mails.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "mails", "dataset_path": "json", "dataset_kwargs": {"data_files": str(path)},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": TEMPLATE,
        "doc_to_choice": OPTIONS, "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


def harness(model, task, arguments):
    import metro.integrations.lm_eval  # noqa: F401  # registers the model type

    results = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], device="cpu", bootstrap_iters=0,
        log_samples=True,
    )  # fmt: skip
    samples = sorted(results["samples"]["mails"], key=lambda sample: sample["doc_id"])
    scores = [[each[0][0] for each in sample["resps"]] for sample in samples]
    return results["results"]["mails"]["acc,none"], scores


@pytest.mark.parametrize("method", ["direct", "channel", "flipped"])
@pytest.mark.client("lm-evaluation-harness", "METRO's scores: direct, channel, flipped")
def test_log_likelihoods_are_those_of_metro(model, task, method):
    arguments = {"pretrained": model, "method": method}
    if method == "flipped":
        arguments["template"] = TEMPLATE
    accuracy, scores = harness("metro", task, arguments)
    expected = Ranker(model, OPTIONS, template=[TEMPLATE], method=method)(MAILS)
    for found, each in zip(scores, expected, strict=True):
        assert found == pytest.approx(list(each.log_probabilities.values()), abs=1e-4)
    right = [each.label == row["label"] for each, row in zip(expected, MAILS, strict=True)]
    assert accuracy == pytest.approx(sum(right) / len(right))


@torch.no_grad()
def test_the_harness_s_own_backend_leaves_the_end_symbol_out(model, task):
    """By hand: METRO's score is its score and the log-probability of the end symbol."""
    from lm_eval.models.huggingface import HFLM

    import metro

    network, tokenizer = metro.load(model)
    theirs = HFLM(pretrained=network, tokenizer=tokenizer, backend="seq2seq", batch_size=4)
    _, without = harness(theirs, task, None)
    _, scores = harness("metro", task, {"pretrained": model, "method": "direct"})
    for row, found, plain in zip(MAILS, scores, without, strict=True):
        source = tokenizer(TEMPLATE.replace("{{body}}", row["body"]), return_tensors="pt")
        for option, mine, their in zip(OPTIONS, found, plain, strict=True):
            target = tokenizer(option, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[*target, tokenizer.eos_token_id]])
            log_p = network(**source, labels=labels).logits[0].log_softmax(-1)
            end = log_p[-1, tokenizer.eos_token_id].item()
            assert mine == pytest.approx(log_p.gather(1, labels[0, :, None]).sum().item(), abs=1e-3)
            assert their == pytest.approx(mine - end, abs=1e-3)


def test_greedy_continuations_and_answers_are_told(model):
    """Oracle: the model's own greedy answer."""
    from lm_eval.api.instance import Instance

    import metro
    from metro.integrations.lm_eval import MetroLM

    loaded = network, tokenizer = metro.load(model)
    lm = MetroLM(model, device="cpu")
    context = MAILS[0]["body"]
    request = Instance("generate_until", {}, (context, {"max_gen_toks": 8}), 0)
    [answer] = lm.generate_until([request])
    assert [answer] == metro.generate(loaded, [context], max_new_tokens=8, progress=False)
    pairs = [(context, " " + text) for text in (answer or "a", "another text")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (score, is_greedy), (_, continuation) in zip(found, pairs, strict=True):
        labels = tokenizer(continuation.strip(), add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[*labels, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = network(**tokenizer(context, return_tensors="pt"), labels=labels).logits[0]
        assert is_greedy == bool((logits.argmax(-1) == labels[0]).all())
        log_p = logits.log_softmax(-1).gather(1, labels[0, :, None]).sum().item()
        assert score == pytest.approx(log_p, abs=1e-3)
