"""A random model of METRO-T5, and inputs for it."""

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from tests.recorded_models import load_released

PAD, EOS = 1, 2
IDS = torch.tensor([[0, 7, 8, 9, 10, 11, 2], [0, 30, 31, 2, PAD, PAD, PAD], [0, 40, 2] + [PAD] * 4])
MASK = IDS.ne(PAD).long()
LABELS = torch.tensor([[5, 6, 7, 8, 2], [9, 2, -100, -100, -100], [11, 12, 13, 2, -100]])


def tiny(**changes) -> MetroT5ForConditionalGeneration:
    """A random model whose every weight matters: norms, biases and relative bias are not 1 or 0."""
    sizes = dict(vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
                 max_positions=64, dropout_rate=0.0)  # fmt: skip
    model = MetroT5ForConditionalGeneration(MetroT5Config(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.shared.weight[EOS] *= 2  # so that answers end at different lengths
    return model.eval()


def tiny_t5() -> T5ForConditionalGeneration:
    """A random T5 with METRO's ids, which is held to the same claims."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
                      dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS,
                      decoder_start_token_id=EOS, tie_word_embeddings=True)  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


MODELS = ["random", "metro_tiny_a", "t5_prompt_tiny_f"]
each_model_and_t5 = pytest.mark.parametrize(
    "model_and_inputs", [*MODELS, pytest.param("t5", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    """A model with a padded batch: random ones, and released folders with recorded inputs."""
    if request.param in ("random", "t5"):
        return tiny() if request.param == "random" else tiny_t5(), IDS, MASK
    golden = request.getfixturevalue("golden")
    model = load_released(golden, request.param)
    arrays = np.load(golden / f"hf_{request.param}.npz")
    return model, torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])


def answers(model, ids, mask, **options) -> torch.Tensor:
    torch.manual_seed(5)
    options = {"max_new_tokens": 15, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **options)
