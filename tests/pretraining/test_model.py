"""The joint model: what is corrupted, what is shared, and what a step does not depend on."""

import math

import pytest
import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.losses import MetroObjective
from metro.pretraining.model import MetroPretrainingModel

SENTINEL = 60


def build(dropout=0.0, **auxiliary) -> MetroPretrainingModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    config = MetroT5Config(
        **sizes, max_positions=32, dropout_rate=dropout, decoder_start_token_id=SENTINEL
    )
    return MetroPretrainingModel(
        config, MetroPretrainingConfig(**{"auxiliary_layers": 1, **auxiliary})
    )


def batch(rows=4, length=12):
    generator = torch.Generator().manual_seed(3)
    original = torch.randint(4, SENTINEL, (rows, length), generator=generator)
    lengths = torch.tensor([length, length - 3, length - 5, length])[:rows]
    is_token = torch.arange(length) < lengths.unsqueeze(1)
    original = original.masked_fill(~is_token, 1)
    is_masked = (torch.rand(rows, length, generator=generator) < 0.3) & is_token
    masked = original.masked_fill(is_masked, SENTINEL)
    shifted = torch.cat([torch.full((rows, 1), SENTINEL), original[:, :-1]], 1)
    return {
        "masked_ids": masked,
        "original_ids": original,
        "is_masked": is_masked,
        "decoder_input_ids": shifted.masked_fill(~is_token, 1),
        "sampling_seed": torch.arange(rows) * 1_000_003,
    }


def corrupted_ids(model, inputs):
    """The main encoder's input during one step."""
    seen = []
    hook = model.main.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs, objective=MetroObjective())
    hook.remove()
    return seen[0]


def test_only_masked_positions_are_corrupted():
    inputs = batch()
    corrupted = corrupted_ids(build(), inputs)
    kept = ~inputs["is_masked"]
    assert torch.equal(corrupted[kept], inputs["masked_ids"][kept])
    assert (corrupted[inputs["is_masked"]] != inputs["masked_ids"][inputs["is_masked"]]).any()


def test_samples_depend_on_the_row_alone():
    """Not on batch mates, their order, or the padding of the batch."""
    model, inputs = build().eval(), batch()
    together = corrupted_ids(model, inputs)
    for row, length in enumerate([12, 9, 7, 12]):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        alone = {k: v if v.dim() == 1 else v[:, :length] for k, v in alone.items()}
        assert torch.equal(corrupted_ids(model, alone)[0], together[row, :length])


def test_a_step_sums_over_its_rows():
    """The loss sums of a batch are those of its halves together."""
    model, inputs = build().eval(), batch()
    whole = model(**inputs, objective=MetroObjective())
    halves = [
        model(**{k: v[half] for k, v in inputs.items()}, objective=MetroObjective())
        for half in (slice(0, 2), slice(2, 4))
    ]
    for name in whole._fields:
        if name != "total":  # scaled by sample_size, so not a sum over rows
            assert float(getattr(whole, name)) == pytest.approx(
                sum(float(getattr(h, name)) for h in halves), rel=1e-5
            ), name


def test_an_upper_bound_of_masked_positions_changes_nothing():
    model, inputs = build().eval(), batch()
    exact = model(**inputs, objective=MetroObjective())
    bounded = model(**inputs, objective=MetroObjective(), max_masked=9)
    for name, a, b in zip(exact._fields, exact, bounded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "objective",
    [
        MetroObjective(),
        MetroObjective(weighted_lm=True),
        MetroObjective(weighted_lm=True, divide_by_mean_weight=True),
    ],
)
def test_a_batch_without_masked_positions_has_a_zero_loss(objective):
    model, inputs = build(), batch()
    inputs["is_masked"] = torch.zeros_like(inputs["is_masked"])
    inputs["masked_ids"] = inputs["original_ids"]
    losses = model(**inputs, objective=objective)
    losses.total.backward()
    assert float(losses.total.detach()) == 0 and int(losses.sample_size) == 0
    assert all(math.isfinite(float(value.detach())) for value in losses)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("share", ["none", "token", "token_pos", "token_pos_norm"])
def test_what_is_shared_is_one_tensor(share):
    model = build(share=share)
    main, auxiliary = model.main.encoder, model.auxiliary.encoder
    assert (main.embed_tokens.weight is auxiliary.embed_tokens.weight) == ("token" in share)
    assert (main.pos_embed.weight is auxiliary.pos_embed.weight) == ("pos" in share)
    assert (main.first_layer_norm.weight is auxiliary.first_layer_norm.weight) == ("norm" in share)


def test_sample_mode_eval_samples_without_dropout_and_trains_with_it():
    inputs = batch()
    calm = build(dropout=0.0).eval()
    want = corrupted_ids(calm, inputs)
    model = build(dropout=0.5, zero_dropout=False, sample_mode="eval").train()
    model.load_state_dict(calm.state_dict())
    assert torch.equal(corrupted_ids(model, inputs), want)
    assert model.auxiliary.training


@pytest.mark.parametrize("zero_dropout, rates", [(True, (0, 0, 0)), (False, (0.5, 0.5, 0.25))])
def test_dropout_of_the_auxiliary_model(zero_dropout, rates):
    config = MetroT5Config(
        vocab_size=64, d_model=16, num_layers=1, dropout_rate=0.5, activation_dropout_rate=0.25
    )
    model = MetroPretrainingModel(config, MetroPretrainingConfig(1, zero_dropout=zero_dropout))
    got = model.auxiliary.encoder.config
    assert rates == (got.dropout_rate, got.attention_dropout_rate, got.activation_dropout_rate)
    assert model.config.dropout_rate == 0.5


def test_without_rtd_head():
    losses = build(rtd_head="none")(**batch(), objective=MetroObjective(rtd_weight=0.0))
    assert float(losses.rtd_loss) == 0 and math.isfinite(float(losses.total.detach()))
