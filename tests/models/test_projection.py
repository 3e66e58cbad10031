"""`projection_input` against the logits of the model itself."""

import pytest
import torch

from metro.models.projection import position_limits, projection_input, start_token
from metro.utils.messages import UserError
from tests.finetuning.conftest import KINDS, small_model


def batch():
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[1, 5:] = 1
    return {
        "input_ids": ids,
        "attention_mask": ids.ne(1),
        "decoder_input_ids": torch.tensor([[2, 5, 6, 7], [2, 8, 9, 1]]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_projected_hidden_states_are_the_models_logits(kind):
    model = small_model(kind)
    with torch.no_grad():
        logits = model(**batch()).logits
        hidden, weight, bias = projection_input(model, **batch())
        projected = torch.nn.functional.linear(hidden, weight, bias)
        torch.testing.assert_close(projected, logits)
        # nothing of the change is left
        torch.testing.assert_close(model(**batch()).logits, logits, rtol=0, atol=0)


def test_the_final_bias_has_the_type_of_the_weights():
    """It is a buffer, which stays in float32 where the parameters are rounded, as by FSDP."""
    model = small_model("bart").bfloat16()
    final_bias = model.final_logits_bias.float()
    model.final_logits_bias = final_bias
    assert projection_input(model, **batch()).bias_V.equal(final_bias[0].bfloat16())


@pytest.mark.parametrize("kind", ["metro", "t5", "bart"])
def test_encoder_outputs_can_be_given(kind):
    model, inputs = small_model(kind), batch()
    with torch.no_grad():
        want = projection_input(model, **inputs).hidden_BTD
        ids = inputs.pop("input_ids")
        encoded = model.get_encoder()(ids, attention_mask=inputs["attention_mask"])
        got = projection_input(model, encoder_outputs=encoded, **inputs).hidden_BTD
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_that_the_logits_reach(kind):
    model = small_model(kind)
    model(**batch()).logits.square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden, weight, bias = projection_input(model, **batch())
    torch.nn.functional.linear(hidden, weight, bias).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_an_error_inside_the_model_leaves_it_as_it_was():
    model = small_model("bart")
    with pytest.raises(ValueError):
        projection_input(model)
    assert model(**batch()).logits.shape == (2, 4, 40)


def test_a_model_that_changes_its_logits_afterwards_is_refused():
    """Oracle: a model made to cap its logits, as T5Gemma does."""
    model = small_model("t5")

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.tanh() * 30
            return output

    model.__class__ = Capped
    with pytest.raises(ValueError, match="Capped changes its logits"):
        projection_input(model, **batch())


def test_weights_that_are_nan_are_not_taken_for_changed_logits():
    model = small_model("t5")
    torch.nn.init.constant_(model.decoder.final_layer_norm.weight, torch.nan)
    assert projection_input(model, **batch()).hidden_BTD.isnan().all()


def test_a_model_without_output_embedding_is_refused():
    model = small_model("t5")
    with pytest.raises(ValueError, match="has no output embedding"):
        projection_input(model.encoder, **batch())


def test_positions_of_every_kind_of_configuration():
    """Oracle: the tables' sizes, from transformers' own configurations."""
    import transformers as hf

    bert = hf.BertConfig(max_position_embeddings=33)
    gpt = hf.BertConfig(max_position_embeddings=44)
    for config, expected in [
        (hf.T5Config(), (None, None)),
        (hf.BartConfig(max_position_embeddings=64), (64, 64)),
        (
            hf.LEDConfig(max_encoder_position_embeddings=9, max_decoder_position_embeddings=8),
            (9, 8),
        ),
        (hf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt), (33, 44)),
        (small_model("metro").config, (1024, 1024)),
    ]:
        limits = position_limits(config)
        assert limits == expected
        short = (
            (5, 600),
            tuple(min(each or n, n) for each, n in zip(expected, (5, 600), strict=True)),
        )
        assert limits.lengths(*short[0]) == short[1]


def test_the_start_symbol_may_stand_in_the_generation_settings():
    model = small_model("bart")
    assert start_token(model) == 2
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 7
    assert start_token(model) == 7
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(UserError, match="BartForConditionalGeneration has no decoder_start_token"):
        start_token(model)
