"""The Hugging Face shells against the original's Hugging Face model (``golden/hf_*``)."""

import numpy as np
import pytest
import torch

from metro.modeling.modeling_metro_t5 import MetroT5EncoderModel
from tests.modeling.conftest import tiny
from tests.recorded_models import load_released

MODELS = ["metro_tiny_a", "t5_prompt_tiny_f", "t5_tiny_c"]


@pytest.fixture(params=MODELS)
def released(request, golden):
    """A model with the weights of a released-layout folder, and the recorded tensors."""
    arrays = np.load(golden / f"hf_{request.param}.npz")
    recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return load_released(golden, request.param), recorded


@torch.no_grad()
def test_logits_equal_the_original(released):
    model, recorded = released
    mask = recorded["attention_mask"]
    output = model(recorded["input_ids"], mask, recorded["decoder_input_ids"])
    rows = len(recorded["logits"])
    states = output.encoder_last_hidden_state[:rows] - recorded["encoder_last_hidden_state"]
    assert states[mask[:rows].bool()].abs().max() < 1e-5
    is_label = ((recorded["labels"] != 1) & (recorded["labels"] >= 0))[:rows]
    assert (output.logits[:rows] - recorded["logits"])[is_label].abs().max() < 3e-5
    alone = MetroT5EncoderModel(model.config)
    alone.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.startswith(("encoder.", "shared."))}
    )
    hidden = alone.eval()(recorded["input_ids"], mask).last_hidden_state
    assert torch.equal(hidden, output.encoder_last_hidden_state)


def test_a_decoder_deeper_than_the_encoder_generates_with_a_cache():
    model, ids = tiny(num_layers=1, num_decoder_layers=3), torch.tensor([[0, 7, 8, 9, 2]])
    cached, plain = (
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_loss_is_the_mean_over_labels_that_are_not_ignored():
    model = tiny()
    labels = torch.tensor([[5, 6, -100]])
    output = model(torch.tensor([[0, 7, 2]]), labels=labels, use_cache=False)
    log_probs = output.logits[0].log_softmax(-1)
    torch.testing.assert_close(output.loss, -(log_probs[0, 5] + log_probs[1, 6]) / 2)
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[model.config.decoder_start_token_id, 5, 6]]
