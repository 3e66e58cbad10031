"""The plan of the comparison on a GPU: its settings exist, and models are trained by it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from metro.data.text.corpus import prepare_text
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.pretraining.configuration import MetroPretrainingConfig
from metro.pretraining.model import MetroPretrainingModel
from metro.utils.files import read_yaml
from tests.conftest import ROOT
from tests.data.prepared import random_text

sys.path.insert(0, str(ROOT / "scripts"))
from evidence_runs import pretrain  # noqa: E402

CONFIGS = ROOT / "fairseq_plugins/configs/pretraining"
PLAN = read_yaml(ROOT / "benchmarks/evidence/gpu.yaml")
TINY = {
    "common.bf16": False,  # fairseq's is of a GPU
    "task.tokens_per_sample": 32,
    "dataset.max_tokens": 256,
    "dataset.num_workers": 0,
    "dataset.disable_validation": True,
    "model.encoder_embed_dim": 16,
    "model.encoder_ffn_embed_dim": 16,
    "model.encoder_layers": 1,
    "model.encoder_attention_heads": 2,
    "model.max_positions": 32,
}


def test_the_plan_is_that_of_cpus_with_fewer_runs():
    """Oracle: the committed plan of CPUs, and the settings of all committed configurations."""
    of_cpus = read_yaml(ROOT / "benchmarks/evidence/cpu.yaml")
    assert PLAN["cpu"] is False and PLAN.keys() <= of_cpus.keys()
    assert PLAN["endpoint"] == of_cpus["endpoint"]
    assert PLAN["datasets"] == of_cpus["datasets"]
    assert PLAN["finetuning"].keys() == of_cpus["finetuning"].keys()
    known = {
        f"{group}.{name}"
        for path in CONFIGS.glob("*.yaml")
        for group, options in read_yaml(path).items()
        for name in options
    }
    known |= {*of_cpus["pretraining"], "dataset.num_workers"}
    for name, arm in PLAN["arms"].items():
        assert (CONFIGS / f"{arm['configuration']}.yaml").is_file()
        assert arm.keys() <= set().union(*(each.keys() for each in of_cpus["arms"].values()))
        assert {*PLAN["pretraining"], *arm.get("set", {})} <= known
        assert len(arm.get("rates", [0.0])) == 1, name
        assert arm.get("time_of", "metro") in PLAN["arms"]
    assert {name for pair in PLAN["compare"] for name in pair} == PLAN["arms"].keys()
    assert PLAN["tuning_seed"] not in PLAN["seeds"]
    assert all("Nothing was run" in PLAN[text] for text in ("reading", "limits"))


def test_the_plan_has_the_size_that_it_states():
    """Oracle: the model itself, without memory; 12 to 60 M parameters, about 240 M tokens."""
    given, metro = PLAN["pretraining"], PLAN["arms"]["metro"]
    heads, width = given["model.encoder_attention_heads"], given["model.encoder_embed_dim"]
    config = MetroT5Config(
        vocab_size=PLAN["vocab_size"] + given["model.max_positions"],
        d_model=width,
        d_kv=width // heads,
        num_heads=heads,
        d_ff=given["model.encoder_ffn_embed_dim"],
        num_layers=given["model.encoder_layers"],
    )
    configuration = read_yaml(CONFIGS / f"{metro['configuration']}.yaml")
    auxiliary_layers = configuration["model"]["generator_layers"]
    with torch.device("meta"):
        model = MetroPretrainingModel(config, MetroPretrainingConfig(auxiliary_layers))
    millions = [
        round(sum(p.numel() for p in part.parameters()) / 1e6) for part in (model.main, model)
    ]
    assert "models of {} M parameters ({} M with".format(*millions) in PLAN["about"]
    assert 12 <= millions[0] <= 60 and f"{millions[0]} M parameters" in gpu_suite()
    tokens = PLAN["updates"] * given["dataset.max_tokens"]
    assert tokens == pytest.approx(240e6, rel=0.02)


def gpu_suite() -> str:
    text = (ROOT / "scripts/gpu_suite.sh").read_text()
    assert "scripts/evidence.py benchmarks/evidence/gpu.yaml" in text
    return text


@pytest.mark.slow
@pytest.mark.fairseq
@pytest.mark.parametrize("arm", PLAN["arms"])
def test_a_small_model_of_each_arm_trains_on_the_cpu(arm, tmp_path):
    """As `scripts/evidence.py` calls fairseq, with sizes of nothing."""
    (tmp_path / "text.txt").write_text(random_text(3, 400))
    prepare_text(
        inputs=[tmp_path / "text.txt"],
        out=tmp_path / "text",
        train_vocab=200,
        valid_fraction=0.1,
        num_workers=1,
        progress=False,
    )
    study = SimpleNamespace(plan=PLAN | {"cpu": True}, out=tmp_path)
    pretrain(study, arm, 0.001, 1, 2, tmp_path / arm, TINY)
    assert (tmp_path / arm / "checkpoint_last.pt").is_file()
