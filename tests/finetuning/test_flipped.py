"""The FLIPPED loss: recorded numbers of the original, and a plain computation."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from metro.finetuning.flipped import flipped_loss, unlikelihood
from tests.finetuning.conftest import small_model


def golden(testdata) -> dict:
    return json.loads((testdata / "golden/flipped/loss.json").read_text())


def pad(rows, width=None) -> torch.Tensor:
    width = width or max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def ids(examples: list[dict], width=None):
    keys = ("correct_ids", "wrong_ids", "target_ids")
    return [pad([example[key] for example in examples], width) for key in keys]


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
    testdata, tiny_t5, in_double, number, width
):
    """Oracle: `fixed_float64`, in double precision to 1e-9; any amount of padding."""
    batch = golden(testdata)["batches"][number]
    want = batch["fixed_float64"]
    model = tiny_t5.double()
    loss = flipped_loss(model, *ids(batch["examples"], width), pad_token_id=0)
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
def test_single_precision_is_as_close_as_the_originals(testdata, tiny_t5, number):
    """Oracle: tolerances of the recorded numbers, 2e-5 for losses and 1e-4 for gradients."""
    batch = golden(testdata)["batches"][number]
    want = batch["fixed_float64"]
    loss = flipped_loss(tiny_t5, *ids(batch["examples"]), pad_token_id=0)
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(want["total"], rel=2e-5)
    assert float(loss.likelihood) == pytest.approx(batch["original"]["l_lm"], rel=2e-5)
    for name, norm in want["grad_norms"].items():
        assert float(tiny_t5.get_parameter(name).grad.norm()) == pytest.approx(norm, rel=1e-4)


def plain(model, right, wrong, target, weight, mean):
    """The formula with full logits, encoder inputs one after the other."""
    terms = []
    for encoder in (right, wrong):
        start = torch.full((len(target), 1), model.config.decoder_start_token_id)
        logits = model(
            input_ids=encoder,
            attention_mask=encoder.ne(1),
            decoder_input_ids=torch.cat([start, target[:, :-1]], 1),
        ).logits
        p = F.softmax(logits.double(), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        terms.append(p)
    likelihood, unlikely = -terms[0].log(), -(1 - terms[1] + 0.01).log()
    real = target.ne(1)
    if mean == "tokens":
        means = [term[real].mean() for term in (likelihood, unlikely)]
    else:
        means = [
            sum(row[r].mean() for row, r in zip(term, real, strict=True)) / len(target)
            for term in (likelihood, unlikely)
        ]
    return means[0] + weight * means[1]


def random_batch():
    generator = torch.Generator().manual_seed(3)
    right = torch.randint(3, 40, (3, 9), generator=generator)
    wrong = torch.randint(3, 40, (3, 12), generator=generator)
    target = torch.randint(3, 40, (3, 6), generator=generator)
    right[0, 4:], wrong[1, 7:], target[2, 2:] = 1, 1, 1
    return right, wrong, target


@pytest.mark.parametrize("kind", ["metro", "t5", "bart"])
@pytest.mark.parametrize("mean", ["tokens", "examples"])
@pytest.mark.parametrize("weight", [3.0, 0.0])
def test_loss_and_gradients_equal_the_formula(kind, mean, weight):
    model = small_model(kind)
    loss = flipped_loss(
        model, *random_batch(), pad_token_id=1, unlikelihood_weight=weight, mean=mean
    )
    loss.total.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want = plain(model, *random_batch(), weight, mean)
    want.backward()
    assert float(loss.total.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_parts_of_a_batch_add_up_to_its_loss(mean):
    """Oracle: the whole batch at once; its number of tokens (or examples) is given to the parts."""
    model, batch = small_model("metro"), random_batch()
    whole = flipped_loss(model, *batch, pad_token_id=1, mean=mean)
    num_items = int(batch[2].ne(1).sum()) if mean == "tokens" else 3
    parts = [
        flipped_loss(
            model,
            *(ids[i : i + 1] for ids in batch),
            pad_token_id=1,
            num_items=num_items,
            mean=mean,
        )
        for i in range(3)
    ]
    assert sum(float(part.total.detach()) for part in parts) == pytest.approx(
        float(whole.total.detach()), rel=1e-5
    )


def test_no_nan_where_the_wrong_label_makes_the_instruction_certain():
    """p -> 1 in bfloat16: the term is -log 0.01 and its gradient finite."""
    model = small_model("metro").bfloat16()
    with torch.no_grad():  # every position says token 5 with probability 1
        model.lm_head.weight.zero_()
        model.decoder.block[-1].layer[-1].layer_norm.weight.zero_()
        model.decoder.block[-1].layer[-1].layer_norm.bias.fill_(30.0)
        model.lm_head.weight[5] = 30.0
    target = torch.full((2, 3), 5)
    loss = flipped_loss(model, target, target, target, pad_token_id=1)
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
    with pytest.raises(ValueError, match="use 0 or more"):
        flipped_loss(
            small_model("metro"), *random_batch(), pad_token_id=1, unlikelihood_weight=weight
        )
