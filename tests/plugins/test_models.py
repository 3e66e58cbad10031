"""Options become models: both entrances, every shipped configuration, original checkpoints."""

from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.criterions import build_criterion
from fairseq.data import Dictionary
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.models import build_model
from fairseq.tasks import setup_task
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import fairseq_plugins
from fairseq_plugins.tasks._pretraining import PretrainingTask
from metro.fusion import fused_attend
from metro.modeling.attention_metro_t5 import Attention
from metro.pretraining.configuration import MetroPretrainingConfig
from tests.plugins.conftest import configure

CONFIGS = Path(fairseq_plugins.__file__).parent / "configs" / "pretraining"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
PUBLISHED = {  # max_tokens, lr, max_update, update_freq, clip_norm
    "metro_t5_base_8gpus": (8192, [0.0004], 125000, [16], 0),
    "metro_t5_base_64gpus": (8192, [0.0004], 125000, [2], 0),
    "metro_t5_basepp_128gpus": (8192, [0.0002], 2000000, [1], 2.0),
    "metro_t5_largepp_256gpus": (2048, [0.0001], 2000000, [2], 2.0),
    "t5_base_8gpus": (8192, [0.0004], 125000, [16], 0),
    "t5_base_64gpus": (8192, [0.0004], 125000, [2], 0),
    "t5_basepp_64gpus": (8192, [0.0002], 2000000, [2], 2.0),
}


def from_yaml(name: str, *overrides: str):
    """A configuration as fairseq-hydra-train sees it after importing the user dir."""
    GlobalHydra.instance().clear()
    hydra_init(name)
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):
        cfg = compose(name, overrides=list(overrides))
    add_defaults(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    add_defaults(cfg)
    return cfg


class TinyDictionaryTask(PretrainingTask):
    """Only what a model needs of a task: a small dictionary with sentinels."""

    @classmethod
    def build(cls, tokens_per_sample=512):
        cfg = {"tokens_per_sample": tokens_per_sample, "data": "nowhere", "mask_prob": 0.15}
        cfg = OmegaConf.create({**cfg, "mask_multiple_length": 1})
        return cls(cfg, Dictionary())


SIZES_OF = {
    "encoder_embed_dim": "d_model",
    "encoder_ffn_embed_dim": "d_ff",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "encoder_attention_heads": "num_heads",
    "encoder_rp_bins": "relative_attention_num_buckets",
    "encoder_rp_max_dist": "relative_attention_max_distance",
    "dropout": "dropout_rate",
    "attention_dropout": "attention_dropout_rate",
    "activation_dropout": "activation_dropout_rate",
    "activation_fn": "feed_forward_proj",
    "max_positions": "max_positions",
}
"""fairseq's options, and fields of ``MetroT5Config``; below their values in this order."""
BASE = (768, 3072, 12, 12, 12, 32, 128, 0.1, 0.1, 0.0, "relu", 1024)
LARGE = (1024, 4096, 24, 24, 16, 128, 256, 0.1, 0.1, 0.0, "relu", 1024)


def sizes(model) -> dict:
    return {option: getattr(model.model.config, field) for option, field in SIZES_OF.items()}


SIZES = {
    name: dict(zip(SIZES_OF, values, strict=True))
    for name, values in (("base", BASE), ("large", LARGE))
}
ARCHITECTURES = [
    ("t5_metro_base_rpe", "base"),
    ("t5_metro_large_rpe", "large"),
    ("transformer_t5_base_rpe", "base"),
    ("transformer_t5_large_rpe", "large"),
]


@pytest.mark.parametrize(("arch", "size"), ARCHITECTURES)
def test_architecture_on_the_command_line_gives_its_sizes(arch, size, corpus):
    cfg = configure(corpus, f"--task t5_metro --arch {arch} --dropout 0.2")
    assert cfg.model._name == arch
    with torch.device("meta"):
        model = build_model(cfg.model, TinyDictionaryTask.build())
    assert sizes(model) == {**SIZES[size], "dropout": 0.2}


@pytest.mark.parametrize(("arch", "size"), ARCHITECTURES)
def test_architecture_in_yaml_gives_its_sizes(arch, size):
    """fairseq's own architecture functions are ignored under hydra."""
    cfg = from_yaml("t5_base_8gpus", f"model._name={arch}", "++model.decoder_layers=3")
    with torch.device("meta"):
        model = build_model(cfg.model, TinyDictionaryTask.build())
    assert sizes(model) == {**SIZES[size], "decoder_layers": 3}


def dropout_rates(config) -> tuple[float, float, float]:
    return config.dropout_rate, config.attention_dropout_rate, config.activation_dropout_rate


@pytest.mark.parametrize("zero", [True, False])
def test_every_dropout_rate_arrives_in_the_auxiliary_model(zero, corpus):
    cfg = from_yaml(
        "metro_t5_tiny",
        "++model.dropout=0.3",
        "++model.attention_dropout=0.2",
        "++model.activation_dropout=0.1",
        f"model.generator_zero_dropout={str(zero).lower()}",
    )
    with torch.device("meta"):
        model = build_model(cfg.model, TinyDictionaryTask.build(128)).model
    assert dropout_rates(model.main.encoder.config) == (0.3, 0.2, 0.1)
    assert dropout_rates(model.main.decoder.config) == (0.3, 0.2, 0.1)
    expected = (0.0, 0.0, 0.0) if zero else (0.3, 0.2, 0.1)
    assert dropout_rates(model.auxiliary.encoder.config) == expected


@pytest.mark.parametrize(("name", "attentions"), [("metro_t5_tiny", 1 + 2 + 4), ("t5_tiny", 6)])
def test_models_are_fused(name, attentions):
    """Encoder layers attend once, decoder layers twice; METRO's auxiliary model has one layer."""
    with torch.device("meta"):
        model = build_model(from_yaml(name).model, TinyDictionaryTask.build(128))
    found = [module.attend for module in model.modules() if isinstance(module, Attention)]
    assert found == [fused_attend] * attentions


@pytest.mark.parametrize("generator_layers", [("base", 3), ("large", 6)])
def test_depth_of_the_auxiliary_model_is_that_of_the_published_code(generator_layers):
    """Its configurations set 4 for base."""
    size, layers = generator_layers
    cfg = from_yaml("t5_base_8gpus", f"model._name=t5_metro_{size}_rpe")
    with torch.device("meta"):
        model = build_model(cfg.model, TinyDictionaryTask.build())
    assert len(model.model.auxiliary.encoder.block) == layers


@pytest.mark.parametrize("name", ["metro_t5_tiny", "t5_tiny"])
def test_settings_of_the_initial_weights_arrive(name):
    """Oracle: what was set; buckets 0 and 31 are 15 before and 16 behind the centre."""
    given = {"token_std": 0.3, "position_std": 0.2, "neighbour_slope": 5.0, "copy_gain": 2.0}
    given |= {"auxiliary_std": 0.1} if name.startswith("metro") else {}
    cfg = from_yaml(name, *(f"++model.init_{setting}={value}" for setting, value in given.items()))
    model = build_model(cfg.model, TinyDictionaryTask.build(128)).model.requires_grad_(False)
    main = getattr(model, "main", model)
    assert main.shared.weight[:, 32:].std() == pytest.approx(0.3, rel=0.05)
    assert main.encoder.pos_embed.weight[2:, :32].std() == pytest.approx(0.2, rel=0.05)
    attention = main.encoder.block[0].layer[0].attention
    assert attention.relative_attention_bias.weight.amin(0).tolist() == [-85, -80, -90, -85]
    assert main.decoder.block[1].layer[1].attention.q.weight.max() == 2
    if name.startswith("metro"):
        weight = model.auxiliary.encoder.block[0].layer[0].attention.q.weight
        assert weight.std() == pytest.approx(0.1, rel=0.05)


def test_every_published_configuration_is_shipped():
    assert {*PUBLISHED, "metro_t5_tiny", "metro_t5_small", "t5_tiny"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_shipped_configuration_arrives(name, corpus):
    """Oracle: the YAML file itself."""
    written = OmegaConf.load(CONFIGS / f"{name}.yaml")
    written.task.data = "given"
    written = OmegaConf.to_container(written, resolve=True)
    cfg = from_yaml(name, f"task.data={corpus}")
    written["task"]["data"] = str(corpus)
    del written["hydra"]
    for group, values in written.items():
        for option, value in values.items():
            found = cfg[group][option]
            if group == "model" and isinstance(value, bool) and isinstance(found, str):
                found = found.lower() == "true"
            value = str(value) if group == "optimizer" and option == "adam_betas" else value
            assert found == (float(value) if isinstance(found, float) else value), option
    assert cfg.lr_scheduler.total_num_update == written["optimization"]["max_update"]

    task = setup_task(cfg.task)
    criterion = build_criterion(cfg.criterion, task)
    with torch.device("meta"):
        model = task.build_model(cfg.model)
    is_large = "large" in written["model"]["_name"]
    expected = dict(SIZES["large" if is_large else "base"])
    expected.update((k, v) for k, v in written["model"].items() if k in expected)
    if name not in PUBLISHED:
        expected["decoder_layers"] = expected["encoder_layers"]
    assert sizes(model) == expected
    assert model.model.config.vocab_size == len(task.dictionary)
    if not name.startswith("metro"):
        return
    auxiliary = model.model.auxiliary
    assert len(auxiliary.encoder.block) == written["model"]["generator_layers"]
    assert dropout_rates(auxiliary.encoder.config) == (0.0, 0.0, 0.0)
    assert auxiliary.encoder.embed_tokens is model.model.main.encoder.embed_tokens
    shares_positions = auxiliary.encoder.pos_embed is model.model.main.encoder.pos_embed
    plusplus_base = name == "metro_t5_basepp_128gpus"
    assert shares_positions == plusplus_base
    assert hasattr(model.model.rtd_head, "dense") == ("pp" in name)
    objective = criterion.objective
    is_small = name not in PUBLISHED
    assert objective.rtd_weight == (10.0 if name == "metro_t5_tiny" else 50.0)
    assert objective.positions == ("none" if is_small else "lm")
    assert objective.weighted_lm == ("pp" not in name and not is_small)


def test_published_facts_of_the_configurations():
    """What the publication states, so that a slip in a file is seen."""
    for name, expected in PUBLISHED.items():
        cfg = from_yaml(name)
        step = cfg.optimization
        found = (cfg.dataset.max_tokens, step.lr, step.max_update, step.update_freq, step.clip_norm)
        assert found == expected, name
        assert cfg.common.bf16 == ("pp" in name) != cfg.common.fp16


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, "simple"), ("True", "simple"), ("true", "simple"), (False, "none"), ("roberta",) * 2],
)
def test_rtd_head_may_be_a_boolean(value, expected):
    assert MetroPretrainingConfig.from_options({"rtd_head": value}, 4).rtd_head == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("rtd_head=bert", "rtd_head is 'bert'; use one of none, simple, roberta"),
        ("share_generator_discriminator_embed=all", "'all'; use one of none, token, token_pos"),
        ("generator_sample_mode=often", "sample_mode is 'often'; use one of train, eval"),
        ("no_generator=true", "no_generator is true.*task t5 with model transformer_t5_base_rpe"),
        ("decoder_embed_dim=32", "encoder_embed_dim is 128 but decoder_embed_dim is 32"),
        ("decoder_attention_heads=2", "heads is 4 but decoder_attention_heads is 2"),
        ("encoder_attention_heads=5", "128 is not divisible by encoder_attention_heads 5"),
        ("max_positions=64", "tokens_per_sample 128 is larger than the model's max_positions 64"),
    ],
)
def test_bad_model_options_are_refused(option, message, corpus):
    cfg = from_yaml("metro_t5_tiny", f"task.data={corpus}", f"++model.{option}")
    task = setup_task(cfg.task)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        task.build_model(cfg.model)


def build_all(cfg):
    """Model, criterion and training data of a configuration."""
    task = setup_task(cfg.task)
    task.load_dataset("train")
    return task.build_model(cfg.model), task.build_criterion(cfg.criterion), task.dataset("train")


def test_rtd_loss_without_a_head_is_refused(corpus):
    cfg = from_yaml("metro_t5_tiny", f"task.data={corpus}", "model.rtd_head=none")
    model, criterion, dataset = build_all(cfg)
    with pytest.raises(ValueError, match="rtd_loss_weight is 10.0 but the model has rtd_head none"):
        criterion(model, dataset.collater([dataset[0]]))


def test_an_rtd_head_without_its_loss_is_refused(corpus):
    """Its parameters would get no gradient, and several processes would stop with an error."""
    options = [f"task.data={corpus}", "criterion.rtd_loss_weight=0"]
    options += ["criterion.weighted_lm_loss=false"]  # that one needs the head
    model, criterion, dataset = build_all(from_yaml("metro_t5_tiny", *options))
    sample = dataset.collater([dataset[0]])
    with pytest.raises(ValueError, match="rtd_loss_weight is 0 .*set model.rtd_head=none"):
        criterion(model.train(), sample)
    criterion(model.eval(), sample)  # looking at a trained model is fine
    model, criterion, _ = build_all(from_yaml("metro_t5_tiny", *options, "model.rtd_head=none"))
    criterion(model.train(), sample)[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["metro_t5_tiny", "t5_tiny"])
def test_the_padding_mask_is_left_out_where_the_batch_says_so(kind, corpus):
    """A full row: the same numbers with the mask, without it, and by looking."""
    cfg = from_yaml(kind, f"task.data={corpus}", "++task.sample_break_mode=none")
    model, criterion, dataset = build_all(cfg)
    batches = (dataset.collater([dataset[i]]) for i in range(9))
    full = next(batch for batch in batches if not batch["net_input"]["has_padding"])
    padded = dataset.collater([dataset[full["id"].item()], dataset[len(dataset) - 1]])
    assert full["net_input"]["has_padding"] is False and padded["net_input"]["has_padding"] is True
    losses = []
    for has_padding in (False, True, None):
        full["net_input"]["has_padding"] = has_padding
        losses.append(criterion(model.eval(), full)[0].item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["metro_tiny_a", "metro_tiny_r", "t5_tiny_c"])
def test_checkpoints_of_the_original_load_with_their_real_depth(name, golden):
    """Their configuration states the generator's depth (1) as encoder_layers."""
    path = golden / f"checkpoints/{name}.pt"
    data = str(golden / "prompt_T0-bin")
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": data}
    )
    assert sizes(models[0])["encoder_layers"] == 2
    key = "main.shared.weight" if "metro" in name else "shared.weight"
    original = torch.load(path, weights_only=True)["model"]["encoder.embed_tokens.weight"]
    assert torch.equal(models[0].model.state_dict()[key], original)


@pytest.mark.parametrize(("letter", "name"), [("a", "metro_tiny_a"), ("c", "t5_tiny_c")])
def test_logged_metrics_equal_those_of_the_original(letter, name, original):
    """Oracle: two half batches through the original's training, as it printed their averages."""
    import json

    import numpy as np
    from fairseq.logging import metrics

    recorded = json.loads((original / f"forward_{letter}.json").read_text())
    arrays = np.load(original / f"forward_{letter}.npz")
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(original / f"checkpoints/{name}.pt")],
        arg_overrides={"data": str(original / "wiki2tiny-bin")},
    )
    criterion = build_criterion(cfg.criterion, task, from_checkpoint=True)
    if letter == "a":
        every_position = {**vars(criterion.objective), "positions": "none"}
        all_scored = type(criterion.objective)(**every_position)
    task.load_dataset("train")
    dataset = task.dataset("train")
    dataset.set_epoch(3)
    outputs, unscored = [], []
    model = models[0].eval()
    for half in (0, 1):
        indices = arrays["sample_indices"][3 * half : 3 * half + 3]
        sample = dataset.collater([dataset[i] for i in indices])
        if letter == "a":
            corrupted = torch.from_numpy(arrays[f"half{half}_replaced_input"]).long()
            sample["net_input"]["corrupted_ids"] = corrupted
            losses = model(**sample["net_input"], objective=all_scored)
            unscored.append(losses.unreplaced_num_correct)
        _, _, output = task.valid_step(sample, model, criterion)
        outputs.append(output)
        expected = recorded["two_half_batches"]["logging_outputs"][half]
        for key in expected.keys() - {"unreplaced_n_correct", "ntokens"}:
            assert float(output[key]) == pytest.approx(float(expected[key]), rel=1e-5), key
    with metrics.aggregate(new_root=True) as aggregate:
        task.reduce_metrics(outputs, criterion)
    found = aggregate.get_smoothed_values()
    # Here accuracy at unreplaced positions is over masked ones; the others are over what they were.
    different = {"wps", "wpb", "unreplaced_n_correct", "unreplaced_accuracy"}
    for key, value in recorded["two_half_batches"]["reduced_metrics"].items():
        if key not in different:
            assert float(found[key]) == pytest.approx(value, abs=2e-3), key
    if letter == "a":
        reduced = recorded["two_half_batches"]["reduced_metrics"]
        assert int(sum(unscored)) == reduced["unreplaced_n_correct"]
