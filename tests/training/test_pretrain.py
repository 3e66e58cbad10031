"""Whole pretraining runs of tiny models."""

import os
import shutil
import signal

import pytest
import torch

import metro
from metro.models.pretraining_model import load_pretraining_model
from metro.pretraining.settings import PretrainingSettings
from metro.training import precision
from metro.training.output_folder import TRAINER_STATE, complete_checkpoints
from metro.utils.files import read_json
from metro.utils.locks import locked
from metro.utils.messages import UserError
from tests.conftest import ROOT
from tests.processes import METRO, run_python
from tests.training.tiny import TINY, assert_same, losses, weights

pytest.importorskip("accelerate")
from metro.training.pretraining_trainer import PretrainingTrainer  # noqa: E402


@pytest.mark.parametrize("task", ["t5_metro", "t5"])
def test_a_stop_within_an_update_is_at_once_and_the_resumed_run_is_bit_exact(
    pretrain, monkeypatch, task
):
    """With dropout, past the end of an epoch. Oracle: a run that was left alone."""
    options = dict(task=task, update_freq=2, max_update=11)
    whole = pretrain("whole", **options).folder
    compute, seen = PretrainingTrainer.losses, []

    def compute_and_terminate(self, model, batch):
        if model.training:
            seen.append(self.state.global_step)
            if seen.count(9) == 1 and seen[-1] == 9:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PretrainingTrainer, "losses", compute_and_terminate)
        pretrain("stopped", **options)
    assert seen.count(9) == 1
    [saved] = complete_checkpoints(whole.parent / "stopped")
    assert read_json(saved / "position.json")["epoch"] == 2
    stopped = pretrain("stopped", **options).folder
    assert_same(whole, stopped)
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == 11


def test_the_model_loads_everywhere_and_its_auxiliary_model_is_kept(pretrain):
    """Oracle: the weights in the file; the loss that the run logged at the end of its updates."""
    result = pretrain(max_update=3, save_interval_updates=2, keep_auxiliary=True)
    assert result.num_updates == 3 and result.metrics["valid_generator_loss"] > 0
    model, tokenizer = metro.load(result.folder)
    assert len(tokenizer) == model.config.vocab_size
    whole = load_pretraining_model(result.folder)
    assert whole is not None and whole.rtd_head is not None
    stored = weights(result.folder)
    assert torch.equal(whole.rtd_head.weight, stored["rtd_head.weight"])
    assert torch.equal(model.shared.weight, stored["shared.weight"])
    assert "| updates | 3 |" in (result.folder / "README.md").read_text()
    checkpoint = complete_checkpoints(result.folder)[-1]  # a model like any other
    assert_same(checkpoint, result.folder)
    again = pretrain(max_update=3)
    assert again.metrics == result.metrics


def test_the_newest_checkpoints_and_those_of_the_pattern_are_kept(pretrain):
    options = dict(save_interval_updates=1, keep_interval_updates=2)
    done = pretrain(max_update=7, keep_interval_updates_pattern=3, **options)
    kept = [int(path.name.split("-")[1]) for path in complete_checkpoints(done.folder)]
    assert kept == [3, 5, 6, 7]


def test_training_starts_from_a_folder_as_from_its_fairseq_checkpoint(pretrain, tmp_path):
    """Oracle: the same weights give the same first loss, another start another."""
    from metro.conversion.hf_to_fairseq import to_fairseq

    first = pretrain("first", max_update=3, keep_auxiliary=True).folder
    to_fairseq(first, tmp_path / "first.pt")
    sources = {"folder": str(first), "file": str(tmp_path / "first.pt")}
    runs = {
        name: losses(pretrain(name, max_update=1, finetune_from_model=source).folder)
        for name, source in sources.items()
    }
    assert runs["folder"] == runs["file"] != losses(first)[:1]


def test_recomputing_activations_changes_no_number_and_bf16_trains(pretrain):
    plain = losses(pretrain("plain", max_update=3).folder)
    assert losses(pretrain("less", max_update=3, checkpoint_activations=True).folder) == plain
    assert losses(pretrain("fp32", max_update=3, fp16=True, precision="fp32").folder) == plain
    rounded = losses(pretrain("bf16", max_update=3, bf16=True).folder)
    assert rounded != plain and rounded == pytest.approx(plain, rel=0.02)


def test_auto_is_bf16_for_wide_models_where_the_cpu_is_fast_at_it(pretrain, monkeypatch):
    """Oracle: runs that were told so."""
    features = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    for feature in features:
        monkeypatch.setattr(torch.cpu, feature, lambda: True)
    runs = {
        name: losses(pretrain(name, max_update=2, precision=name).folder)
        for name in ("fp32", "bf16", "auto")
    }
    assert runs["auto"] == runs["fp32"] != runs["bf16"]  # narrow
    monkeypatch.setattr(precision, "LEAST_BF16_WIDTH", 1)
    assert losses(pretrain("wide", max_update=2).folder) == runs["bf16"]
    for feature, type_of_products in zip(features, ("bf16", "fp32"), strict=True):
        monkeypatch.setattr(torch.cpu, feature, lambda: False)
        assert losses(pretrain(feature, max_update=2).folder) == runs[type_of_products]


def test_shards_take_turns_and_the_place_in_them_is_kept(pretrain, pretraining_data, tmp_path):
    """Oracle: a run that was left alone, over two shards of different length.

    In a folder that lists them, too, as `metro prepare-text --shards` does.
    """
    other = tmp_path / "other"
    shutil.copytree(pretraining_data, other, ignore=shutil.ignore_patterns("prepare_text.json"))
    for suffix in (".bin", ".idx"):
        shutil.copyfile(other / f"valid{suffix}", other / f"train{suffix}")
    data = f"{other}:{pretraining_data}"
    options = dict(data=data, max_update=8, save_interval_updates=5)
    whole = pretrain("whole", **options).folder
    part = shutil.copytree(whole, tmp_path / "part")
    for path in (part / "config.json", part / TRAINER_STATE):
        path.unlink()
    shutil.rmtree(part / "checkpoint-8")
    shutil.copytree(pretraining_data, tmp_path / "second")
    (tmp_path / "prepare_text.json").write_text('{"shards": ["other", "second"]}')
    options["data"] = str(tmp_path)
    assert_same(whole, pretrain("part", **options).folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_prob": 1.5}, "mask_prob is 1.5; it is a share"),
        ({"tokens_per_sample": 65}, "tokens_per_sample 65 is larger than the model's max_pos"),
        ({"encoder_attention_heads": 3}, "16 is not divisible by encoder_attention_heads 3"),
        ({"rtd_head": "none"}, "rtd_loss_weight is 50.0 but the model has rtd_head none"),
        ({"arch": "transformer_t5"}, "arch transformer_t5 is not of the task t5_metro"),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"data": "nowhere"}, "no dict.txt in the data folder nowhere"),
        ({"finetune_from_model": "nowhere.pt"}, "there is no file or folder nowhere.pt"),
        ({"max_tokens": 20}, "more than max_tokens 20"),
    ],
)
def test_what_does_not_fit_together_is_one_line(pretrain, options, message):
    with pytest.raises(UserError, match=message):
        pretrain(max_update=1, **options)


def test_a_run_killed_before_its_model_was_written_trains_no_more(pretrain):
    """Oracle: the model that is deleted, and its card."""
    folder = pretrain(max_update=3).folder
    before, logged = weights(folder), losses(folder)
    facts = read_json(folder / "training.json")
    for path in folder.glob("*.*"):
        if path.is_file() and path.name not in ("pretrain.yaml", "inputs.json"):
            path.unlink()
    assert pretrain(max_update=3).num_updates == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    assert (losses(folder), read_json(folder / "training.json")) == (logged, facts)


def test_two_do_not_train_in_one_folder(pretrain, tmp_path):
    with locked(tmp_path / "out", inside=True), pytest.raises(UserError, match="is being written"):
        pretrain("out", max_update=1)


def test_a_loss_that_turns_nan_stops_the_run_naming_the_examples(pretrain, monkeypatch):
    compute = PretrainingTrainer.losses

    def spoil(self, model, batch):
        if self.state.global_step == 1:
            with torch.no_grad():
                self.model.main.lm_head.weight.fill_(float("nan"))
        return compute(self, model, batch)

    monkeypatch.setattr(PretrainingTrainer, "losses", spoil)
    with pytest.raises(UserError, match="loss of update 2 is NaN .* sample ids"):
        pretrain(max_update=3)


def test_an_update_whose_gradient_overflows_is_not_one(pretrain, monkeypatch):
    """fp16's loss scale, far too large at first. Oracle: a run from the batches behind those."""
    from metro.pretraining import batches

    options = dict(clip_norm=0.0, disable_validation=True)
    with monkeypatch.context() as patch:
        make = PretrainingTrainer.create_accelerator_and_postprocess

        def make_with_scaler(self):
            make(self)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**63)

        patch.setattr(PretrainingTrainer, "create_accelerator_and_postprocess", make_with_scaler)
        scaled = pretrain("scaled", max_update=4, save_interval_updates=2, **options).folder
    saved = complete_checkpoints(scaled)
    assert [path.name for path in saved] == ["checkpoint-2", "checkpoint-4"]
    place = batches.Position(**read_json(saved[-1] / "position.json"))
    assert place.epoch == 1 and (num_skipped := place.done - 4) > 2
    monkeypatch.setattr(batches, "START", place._replace(done=num_skipped))
    assert_same(scaled, pretrain("behind", max_update=4, **options).folder, rtol=1e-6, atol=1e-7)
    assert losses(scaled) == losses(scaled.parent / "behind")


@pytest.mark.parametrize("name", PretrainingSettings.shipped())
def test_every_configuration_gives_its_model(name):
    """Oracle: the parameters of the published sizes; a vocabulary of 32,768 with sentinels."""
    from metro.pretraining.building import build_model

    settings = PretrainingSettings.combine(name, {"data": "data"}).resolved()
    with torch.device("meta"):
        model = build_model(settings, 32_768 - settings.tokens_per_sample)
    count = sum(parameter.numel() for parameter in model.main.parameters()) / 1e6
    sizes = {"tiny": (1, 6), "small": (8, 20), "base": (220, 230), "large": (700, 800)}
    least, most = next(bounds for size, bounds in sizes.items() if size in name)
    assert least < count < most
    assert settings.output_dir == f"runs/{name}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_model_trains_the_same(pretrain):
    options = dict(max_update=4, dropout=0.0, attention_dropout=0.0, disable_validation=True)
    plain, compiled = (pretrain(str(how), compile=how, **options).folder for how in (False, True))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert_same(compiled, plain, rtol=1e-3, atol=1e-4)


def in_two_processes(data, folder, environment=None, **options) -> None:
    flags = []
    for key, value in {**TINY, **options, "data": data, "output_dir": folder}.items():
        flag = f"--{key.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    torchrun = ("-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--nproc_per_node", "2")
    torchrun += ("--rdzv_endpoint", "localhost:0")
    run_python(*torchrun, *METRO, "pretrain", *flags, env=environment or {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_two_processes_train_the_model_of_one_and_one_goes_on(pretrain, pretraining_data, tmp_path):
    """Behind the same share of the epoch; and without fairseq, which cannot be imported here."""
    for name in ("fairseq", "fairseq_cli", "hydra", "omegaconf"):
        (tmp_path / "none").mkdir(exist_ok=True)
        (tmp_path / f"none/{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    options = dict(dropout=0.0, attention_dropout=0.0, seed=3)
    alone = pretrain("alone", update_freq=2, max_update=6, **options).folder
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "none"), str(ROOT)])}
    in_two_processes(pretraining_data, tmp_path / "both", path, max_update=3, **options)
    both = pretrain("both", update_freq=2, max_update=6, **options).folder
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    assert_same(alone, both, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_process_without_batches_waits_for_the_other(pretrain, pretraining_data, tmp_path):
    """All text is one batch, so that the second process only ever fills in."""
    options = dict(dropout=0.0, attention_dropout=0.0, seed=3, max_update=2)
    options |= dict(max_tokens=10**6, required_batch_size_multiple=1)
    alone = pretrain("alone", **options).folder
    in_two_processes(pretraining_data, tmp_path / "both", **options)
    assert losses(tmp_path / "both") == pytest.approx(losses(alone), rel=1e-5)
