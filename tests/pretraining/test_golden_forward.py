"""Forward pass, losses, counts and gradients against the original (``golden/forward_*``).

METRO: a is base-style, b base++-style, r as b with large random weights. T5: c and s.
Reached in float32: 3e-6 of the largest logit, 2e-7 in losses, 2e-6 in gradient norms.
"""

import pytest
import torch

from metro.pretraining.losses import token_cross_entropy
from tests.pretraining.golden import PUBLISHED_NAMES, load_batch, metro_forward, parameter

METRO, T5 = ["a", "b", "r"], ["c", "s"]


def recorded_batch(request):
    """The batches of b and c are in the whole recording alone."""
    source = "original" if request.param in "bc" else "golden"
    return load_batch(request.getfixturevalue(source), request.param)


@pytest.fixture(params=METRO)
def metro(request):
    return recorded_batch(request)


@pytest.fixture(params=T5)
def t5(request):
    return recorded_batch(request)


def assert_close(got, want):
    """Largest difference below 1e-5 of the largest magnitude, in the rows that were kept."""
    assert (got[: len(want)] - want).abs().max() <= 1e-5 * want.abs().max()


def all_positions(metro, corrupted):
    """Encoder states, decoder states and RTD logits of every position."""
    main, mask = metro.model.main, metro.arrays["discriminator_target"].ne(1)
    encoder_out = main.encoder(corrupted, mask).last_hidden_state
    decoder_out = main.decoder(
        metro.arrays["prev_output_tokens"],
        encoder_hidden_states=encoder_out,
        encoder_attention_mask=mask,
    ).last_hidden_state
    return encoder_out, decoder_out, metro.model.rtd_head(encoder_out).squeeze(-1)


@torch.no_grad()
def test_metro_outputs_equal_the_original(metro):
    arrays = metro.arrays
    is_masked = arrays["generator_target"].ne(1)
    is_token = arrays["discriminator_target"].ne(1)
    positions = is_masked.int().argsort(dim=1, descending=True, stable=True)
    positions = positions[:, : is_masked.sum(1).max()]
    mlm_logits = metro.model.auxiliary(arrays["src_tokens"], is_token, positions)
    rows = is_masked.gather(1, positions)
    assert_close(mlm_logits[rows], arrays["generator_logits_masked"])

    encoder_out, decoder_out, rtd_logits = all_positions(metro, arrays["replaced_input"])
    kept = is_token[: len(arrays["encoder_out"])]
    assert_close(encoder_out[is_token], arrays["encoder_out"][kept])
    assert_close(decoder_out[is_token], arrays["decoder_features"][kept])
    assert_close(rtd_logits[is_token], arrays["rtd_logits"][is_token])
    logits = metro.model.main.lm_head(decoder_out)
    assert_close(logits[is_masked], arrays["decoder_logits_masked"])
    log_probs = logits.double().log_softmax(-1)
    target = arrays["discriminator_target"].unsqueeze(-1)
    assert_close(
        log_probs.gather(-1, target).squeeze(-1)[is_token],
        arrays["decoder_target_logprob"][is_token],
    )
    assert torch.equal(logits.argmax(-1)[is_token], arrays["decoder_argmax"][is_token])


def test_metro_losses_and_counts_equal_the_original_in_every_variant(metro):
    """Where only masked positions are projected, unreplaced predictions are counted among those."""
    arrays, variants = metro.arrays, metro.numbers["criterion_variants"]
    assert len(variants) == 12
    is_masked = arrays["generator_target"].ne(1)
    kept = is_masked & arrays["replaced_input"].eq(arrays["discriminator_target"])
    kept_correct = kept & arrays["decoder_argmax"].eq(arrays["discriminator_target"])
    for variant in variants:
        settings = variant["settings"]
        losses = metro_forward(metro.model, arrays, settings)
        want = dict(variant["logging_output"])
        assert want.pop("nsentences") == len(is_masked)
        if settings["masked_positions_only"] != "none":
            want["unreplaced_n_correct"] = kept_correct.sum()
            assert losses.num_unreplaced_scored == kept.sum()
        else:
            assert losses.num_unreplaced_scored == want["unreplaced_total"]
        for name, value in want.items():
            got = getattr(losses, PUBLISHED_NAMES[name]).detach()
            if name.endswith(("loss",)):
                assert float(got) == pytest.approx(float(value), rel=1e-6), (name, settings)
            else:
                assert int(got) == int(value), (name, settings)
        metro.model.zero_grad()
        losses.total.backward()
        norm = sum(p.grad.double().square().sum() for p in metro.model.parameters()).sqrt()
        assert float(norm) == pytest.approx(variant["grad_norm_unscaled"], rel=1e-5)


def test_metro_gradient_of_every_parameter_equals_the_original(metro):
    """The norms and token embedding rows were recorded under ``criterion``, and the other arrays
    after the last of the variants (decoder gradients are zero there)."""
    metro_forward(metro.model, metro.arrays, metro.numbers["criterion"]).total.backward()
    assert_gradient_norms_equal(metro)
    assert_embedding_rows_equal(metro)
    metro.model.zero_grad()
    last = metro.numbers["criterion_variants"][-1]["settings"]
    metro_forward(metro.model, metro.arrays, last).total.backward()
    assert_gradient_arrays_equal(metro)


def test_metro_half_batches_equal_the_original(metro):
    """Shorter padding and other batch mates: each half has its own recorded numbers."""
    for half, want in enumerate(metro.numbers["two_half_batches"]["logging_outputs"]):
        rows = slice(0, 3) if half == 0 else slice(3, 6)
        replaced = metro.arrays[f"half{half}_replaced_input"]
        names = "src_tokens discriminator_target generator_target prev_output_tokens".split()
        batch = {name: metro.arrays[name][rows, : replaced.shape[1]] for name in names}
        losses = metro_forward(
            metro.model, {**batch, "replaced_input": replaced}, metro.numbers["criterion"]
        )
        for name in ("loss", "generator_loss", "discriminator_loss", "rtd_loss", "replaced_total"):
            got = float(getattr(losses, PUBLISHED_NAMES[name]).detach())
            assert got == pytest.approx(want[name], rel=1e-6), (half, name)


def t5_forward(t5):
    arrays = t5.arrays
    mask = arrays["src_tokens"].ne(1)
    output = t5.model(arrays["src_tokens"], mask, arrays["prev_output_tokens"], use_cache=False)
    return output, arrays["target"].ne(1)


def test_t5_outputs_loss_and_gradients_equal_the_original(t5):
    output, is_target = t5_forward(t5)
    arrays, numbers = t5.arrays, t5.numbers
    is_token = arrays["src_tokens"].ne(1)
    kept = is_token[: len(arrays["encoder_out"])]
    assert_close(output.encoder_last_hidden_state[is_token], arrays["encoder_out"][kept])
    assert_close(output.logits[is_target], arrays["decoder_logits_nonpad"])
    targets = arrays["target"][is_target]
    assert int((output.logits[is_target].argmax(-1) == targets).sum()) == int(
        numbers["logging_output"]["n_correct"]
    )
    assert len(numbers["criterion_variants"]) == 4
    for number, variant in enumerate(numbers["criterion_variants"]):
        is_scored = is_target.clone()
        is_scored[:, : variant["settings"].get("ignore_prefix_size", 0)] = False
        smoothing = variant["settings"]["label_smoothing"]
        t5.model.zero_grad()
        logits = t5_forward(t5)[0].logits[is_scored]
        words = torch.eye(logits.shape[-1])  # hidden states are logits
        loss = token_cross_entropy(logits, words, arrays["target"][is_scored], smoothing)
        nll = variant["logging_output"]["nll_loss"]
        assert float(loss.nll.sum().detach()) == pytest.approx(nll, rel=1e-6)
        assert float(loss.loss.sum().detach()) == pytest.approx(variant["loss"], rel=1e-6)
        loss.loss.sum().backward()
        if number == 0:
            assert_gradient_norms_equal(t5)
            assert_embedding_rows_equal(t5)
    assert_gradient_arrays_equal(t5)


def assert_gradient_norms_equal(batch):
    checked = 0
    for name, norm in batch.numbers["grad_norm_per_param"].items():
        weight = parameter(batch.model, name)
        if weight is None or norm is None or name.endswith("k_proj.bias"):
            continue  # the gradient of a key bias is zero up to rounding
        # Norms below 1e-6 are rounding noise too (the attention of metro_tiny_a has collapsed).
        assert float(weight.grad.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        checked += 1
    assert checked >= 60


ROWS = "grad::encoder.embed_tokens.weight[rows]"


def assert_embedding_rows_equal(batch):
    gradient = parameter(batch.model, "encoder.embed_tokens.weight").grad
    assert_close(gradient[batch.arrays["grad_rows_embed_tokens"]], batch.arrays[ROWS])


def assert_gradient_arrays_equal(batch):
    recorded = {n: v for n, v in batch.arrays.items() if n.startswith("grad::") and n != ROWS}
    assert len(recorded) >= 8
    for key, want in recorded.items():
        name, _, part = key.removeprefix("grad::").partition("[")
        got = parameter(batch.model, name).grad
        got = torch.zeros_like(want) if got is None else got[: len(want)] if part else got
        assert (got - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7, key
