"""Losses of every objective: recorded numbers of the original, plain computations."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from metro.finetuning.losses import LossOptions, batch_loss, unlikelihood, unlikelihood_loss
from tests.finetuning.conftest import small_model
from tests.processes import run_python


def recorded(golden) -> dict:
    return json.loads((golden / "flipped/loss.json").read_text())


def pad(rows, width=None) -> torch.Tensor:
    width = width or max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def ids(examples: list[dict], width=None):
    keys = ("correct_ids", "wrong_ids", "target_ids")
    return [pad([example[key] for example in examples], width) for key in keys]


def flipped_loss(model, right, wrong, target, options):
    return unlikelihood_loss(model, options, right, target, wrong)


@pytest.fixture
def in_double(monkeypatch):
    """Hugging Face's T5 has float32 inside, in its norms and softmax, whatever its weights are."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, True) + self.variance_epsilon)

    monkeypatch.setattr(T5LayerNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("width", [None, 40])
def test_value_and_gradients_equal_the_original_without_its_pad_quirk(
    golden, tiny_t5, in_double, number, width
):
    """Oracle: `fixed_float64`, in double precision to 1e-9; any amount of padding."""
    batch = recorded(golden)["batches"][number]
    want = batch["fixed_float64"]
    model = tiny_t5.double()
    loss = flipped_loss(model, *ids(batch["examples"], width), LossOptions("flipped", 0))
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(want["total"], rel=1e-9)
    assert float(loss.likelihood) == pytest.approx(want["l_lm"], rel=1e-9)
    assert float(loss.unlikelihood) == pytest.approx(want["l_ul"], rel=1e-9)
    for name, norm in want["grad_norms"].items():
        gradient = model.get_parameter(name).grad
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-8, abs=1e-12), name
    for got, rows in (
        (loss.right_log_prob_B, want["token_logprobs_correct"]),
        (loss.wrong_log_prob_B, want["token_logprobs_wrong"]),
    ):
        assert got.tolist() == pytest.approx([sum(row) for row in rows], rel=1e-9)


@pytest.mark.parametrize("number", range(3))
def test_single_precision_is_as_close_as_the_originals(golden, tiny_t5, number):
    """Oracle: tolerances of the recorded numbers, 2e-5 for losses and 1e-4 for gradients."""
    batch = recorded(golden)["batches"][number]
    want = batch["fixed_float64"]
    loss = flipped_loss(tiny_t5, *ids(batch["examples"]), LossOptions("flipped", 0))
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(want["total"], rel=2e-5)
    assert float(loss.likelihood) == pytest.approx(batch["original"]["l_lm"], rel=2e-5)
    for name, norm in want["grad_norms"].items():
        assert float(tiny_t5.get_parameter(name).grad.norm()) == pytest.approx(norm, rel=1e-4)


# --- plain computations with full logits, one encoder input after the other ---


def random_batch():
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(3, 40, (3, 9), generator=generator)
    wrong = torch.randint(3, 40, (3, 12), generator=generator)
    target = torch.randint(3, 40, (3, 6), generator=generator)
    source[0, 4:], wrong[1, 7:], target[2, 2:] = 1, 1, 1
    return source, wrong, target


def log_probs(model, source, target):
    start = torch.full((len(target), 1), model.config.decoder_start_token_id)
    logits = model(
        input_ids=source,
        attention_mask=source.ne(1),
        decoder_input_ids=torch.cat([start, target[:, :-1]], 1),
    ).logits
    return logits.double().log_softmax(-1)


def of_target(log_p, target):
    return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def average(values, target, mean):
    is_token = target.ne(1)
    if mean == "tokens":
        return values[is_token].mean()
    rows = [row[real].mean() for row, real in zip(values, is_token, strict=True)]
    return sum(rows) / len(rows)


def check(model, options, want, *batch):
    """`batch_loss` and its gradients are those of `want`."""
    loss = batch_loss(model, options, *batch)
    loss.total.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want.backward()
    assert float(loss.total.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    return loss


@pytest.mark.parametrize("kind", ["metro", "t5", "bart"])
@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_direct_is_the_mean_negative_log_likelihood(kind, mean):
    model = small_model(kind)
    source, _, target = random_batch()
    log_p = log_probs(model, source, target)
    want = average(-of_target(log_p, target), target, mean)
    loss = check(model, LossOptions("direct", 1, mean), want, source, target)
    exact = (log_p.argmax(-1).eq(target) | target.eq(1)).all(1).sum()
    assert float(loss.sums["exact"]) == int(exact)
    assert float(loss.sums["tokens"]) == int(target.ne(1).sum())


def test_label_smoothing_is_fairseqs():
    """As Szegedy et al. (2016) in fairseq's form: e / (V - 1) for every other token."""
    model = small_model("metro")
    source, _, target = random_batch()
    log_p = log_probs(model, source, target)
    share = 0.1 / (log_p.shape[-1] - 1)
    value = -(1 - 0.1 - share) * of_target(log_p, target) - share * log_p.sum(-1)
    options = LossOptions("direct", 1, label_smoothing=0.1)
    loss = check(model, options, average(value, target, "tokens"), source, target)
    padded = F.pad(target, (0, 3), value=1)
    torch.testing.assert_close(batch_loss(model, options, source, padded).total, loss.total)


@pytest.mark.parametrize("kind", ["metro", "t5", "bart"])
@pytest.mark.parametrize("mean", ["tokens", "examples"])
@pytest.mark.parametrize("weight", [3.0, 0.0])
@pytest.mark.parametrize("objective", ["flipped", "direct+ul"])
def test_both_terms_equal_the_formula(objective, kind, mean, weight):
    """The wrong label is read by the encoder (flipped), or is a target of another length."""
    model = small_model(kind)
    source, wrong, target = random_batch()
    right_log_p = of_target(log_probs(model, source, target), target)
    if objective == "flipped":
        wrong_target = target
        wrong_log_p = of_target(log_probs(model, wrong, target), target)
    else:
        wrong_target = wrong
        wrong_log_p = of_target(log_probs(model, source, wrong), wrong)
    want = average(-right_log_p, target, mean) + weight * average(
        -(1 - wrong_log_p.exp() + 0.01).log(), wrong_target, mean
    )
    options = LossOptions(objective, 1, mean, weight)
    loss = check(model, options, want, source, target, wrong)
    right = (right_log_p * target.ne(1)).sum(1)
    other = (wrong_log_p * wrong_target.ne(1)).sum(1)
    assert float(loss.sums["ranked_right"]) == int((right > other).sum())
    assert float(loss.sums["wrong_log_prob"]) == pytest.approx(float(other.sum().detach()))


@pytest.mark.parametrize("objective", ["direct", "flipped", "direct+ul"])
@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_parts_of_a_batch_add_up_to_its_loss(objective, mean):
    """Oracle: the whole batch at once; its number of tokens (or examples) is given to the parts."""
    model, (source, wrong, target) = small_model("metro"), random_batch()
    if objective == "direct+ul":  # of as many tokens as the right label
        wrong = torch.where(target.eq(1), 1, target.flip(0).clamp(min=3))

    def loss(rows, num_items=None) -> float:
        options = LossOptions(objective, 1, mean)
        total = batch_loss(
            model, options, source[rows], target[rows], wrong[rows], num_items=num_items
        ).total
        return float(total.detach())

    num_items = int(target.ne(1).sum()) if mean == "tokens" else 3
    parts = [loss(slice(i, i + 1), num_items) for i in range(3)]
    assert sum(parts) == pytest.approx(loss(slice(None)), rel=1e-5)


def test_no_nan_where_the_wrong_label_makes_the_instruction_certain():
    """p -> 1 in bfloat16: the term is -log 0.01 and its gradient finite."""
    model = small_model("metro").bfloat16()
    with torch.no_grad():  # every position says token 5 with probability 1
        model.lm_head.weight.zero_()
        model.decoder.block[-1].layer[-1].layer_norm.weight.zero_()
        model.decoder.block[-1].layer[-1].layer_norm.bias.fill_(30.0)
        model.lm_head.weight[5] = 30.0
    target = torch.full((2, 3), 5)
    loss = flipped_loss(model, target, target, target, LossOptions("flipped", 1))
    loss.total.backward()
    assert float(loss.likelihood) == 0
    assert float(loss.unlikelihood) == pytest.approx(-math.log(0.01), rel=1e-4)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("p", [0.0, 1e-8, 0.3, 0.999, 1.0])
def test_unlikelihood_is_exact_at_both_ends(p):
    nll = torch.tensor(math.inf if p == 0 else -math.log(p), dtype=torch.float32)
    assert float(unlikelihood(nll)) == pytest.approx(-math.log(1 - p + 0.01), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_lambda_that_makes_no_sense_is_refused(weight):
    options = LossOptions("flipped", 1, unlikelihood_weight=weight)
    with pytest.raises(ValueError, match="use 0 or more"):
        flipped_loss(small_model("metro"), *random_batch(), options)


@pytest.mark.parametrize("what", [pytest.param("blocks", marks=pytest.mark.slow), "everything"])
@pytest.mark.client("FSDP2", "losses of all objectives; saving and exporting")
def test_losses_of_a_sharded_model_are_those_of_the_whole_one(golden, tmp_path, what):
    """Two processes compare losses and gradients; what they save holds the whole weights."""
    script = Path(__file__).with_name("sharded_training.py")
    run = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    run_python(*run, script, what, golden / "tiny_vocab", tmp_path)
    whole = small_model("metro").state_dict()
    for name in ("exported", "saved"):
        found = type(small_model("metro")).from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
