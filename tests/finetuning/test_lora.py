"""QLoRA: adapters trained beside weights in 8 or 4 bits, with bitsandbytes on the CPU."""

import pytest
import torch
from safetensors.torch import load_file

import metro
from metro.finetuning.settings import FinetuningSettings
from metro.utils.messages import UserError
from tests.finetuning.prepared import write_t5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for blocks of 64 weights."""
    return write_t5(tmp_path_factory.mktemp("t5") / "model", d_model=64, num_heads=4)


@pytest.mark.parametrize(
    ("objective", "bits"),
    [("direct", "8bit"), ("channel", "4bit"), ("flipped", "4bit"), ("direct+ul", "4bit")],
)
def test_adapters_beside_rounded_weights_train_resume_and_are_models(
    model, prepared, tmp_path, objective, bits
):
    """Oracles: a run that is not interrupted; the adapter merged into the base as it is stored."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")

    def train(name: str, steps: int):
        return metro.finetune(
            model=str(model),
            data=str(prepared),
            output_dir=str(tmp_path / name),
            objective=objective,
            lora=True,
            load_in=bits,
            learning_rate=1e-2,
            batch_size=8,
            max_steps=steps,
            save_steps=2,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            progress=False,
        ).folder

    whole = train("whole", 4)
    train("parts", 2)
    weights = [load_file(f / "adapter_model.safetensors") for f in (whole, train("parts", 4))]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(w.abs().max() > 0 for name, w in weights[0].items() if "lora_B" in name)

    merged = metro.load(whole)
    beside = metro.load(whole, load_in=bits)
    assert any("lora" in name for name in beside.model.state_dict())
    texts, options = ["it was lovely", "it was sad"], ["Good", "Bad"]
    ranked = [metro.Ranker(each, options)(texts) for each in (merged, beside)]
    for one, other in zip(*ranked, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.1)
    assert ranked[0] != [*metro.Ranker(metro.load(model), options)(texts)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "weights in 4bit cannot be trained: add lora"),
        ({"lora": True, "fsdp": "full"}, "not sharded: leave load_in or fsdp out"),
        ({"lora": True, "deepspeed": "x.json"}, "not sharded: leave load_in or deepspeed out"),
    ],
)
def test_rounded_weights_are_trained_beside_adapters_in_one_piece(given, message):
    with pytest.raises(UserError, match=message):
        FinetuningSettings(model="m", data="d", output_dir="o", load_in="4bit", **given)
