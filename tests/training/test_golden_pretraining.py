"""`metro pretrain` against recorded updates of the original (``golden/train5_*``)."""

import json

import numpy as np
import pytest
import torch

from metro.data.collation import MaskedBatch, SpanBatch
from metro.data.indexed_file import IndexedFile
from metro.models.fairseq_names import metro_name
from metro.pretraining.batches import MicroBatch, Position, Update, Updates
from metro.pretraining.building import build_model
from metro.pretraining.dataset import PretrainingDataset
from metro.pretraining.settings import PretrainingSettings
from metro.training.pretrain import training_arguments
from metro.training.pretraining_files import load_weights
from tests.pretraining.golden import CHECKPOINT, load_checkpoint
from tests.pretraining.test_golden_training import RUNS

pytest.importorskip("accelerate")
from metro.training.pretraining_trainer import PretrainingTrainer  # noqa: E402

FIRST_SENTINEL = 1000


def settings_of(letter: str, run: str, golden, tmp_path) -> PretrainingSettings:
    """What the recorded run was trained with, as its README and its checkpoint say."""
    criterion = dict(load_checkpoint(golden, CHECKPOINT[letter])["cfg"]["criterion"])
    criterion = {k: v for k, v in criterion.items() if k in PretrainingSettings.names()}
    options = load_checkpoint(golden, CHECKPOINT[letter])["cfg"]["model"]
    auxiliary = ("rtd_head", "share_generator_discriminator_embed")
    return PretrainingSettings(
        data=str(golden / "tiny_vocab"),
        output_dir=str(tmp_path / "out"),
        task="t5" if letter in "cs" else "t5_metro",
        **criterion,
        **{name: str(options[name]) for name in auxiliary if name in options},
        generator_layers=1,
        generator_zero_dropout=True,
        encoder_embed_dim=64,
        encoder_ffn_embed_dim=128,
        encoder_layers=2,
        encoder_attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        sample_break_mode="complete_doc",
        tokens_per_sample=128,
        shorten_method="random_crop",
        shorten_data_split_list="train",
        max_tokens=1024,
        update_freq=2 if letter in "bc" else 1,
        lr=0.003,
        warmup_updates=2,
        total_num_update=8,
        max_update=5,
        clip_norm=RUNS[run][1],
        log_interval=1,
        save_interval_updates=0,
        num_workers=0,
        cpu=True,
        report_to="none",
    ).resolved()


class RecordedBatch(MaskedBatch):
    """A batch with the tokens that the original sampled."""

    def _asdict(self):
        return {**super()._asdict(), "corrupted_ids": self.corrupted_ids}


def recorded_batch(arrays: dict[str, np.ndarray]) -> MaskedBatch | SpanBatch:
    parts = {name: torch.from_numpy(value).long() for name, value in arrays.items()}
    source = parts["src_tokens"]
    numbers = torch.arange(len(source))
    lengths = source.ne(1).sum(1)
    common = {"indices": numbers, "lengths": lengths, "has_padding": True}
    if "target" in parts:
        return SpanBatch(
            **common,
            input_ids=source,
            target_ids=parts["target"],
            decoder_input_ids=parts["prev_output_tokens"],
            num_target_tokens=int(parts["target"].ne(1).sum()),
            num_text_tokens=0,
        )
    is_masked = parts["generator_target"].ne(1)
    batch = RecordedBatch(
        **common,
        original_ids=parts["discriminator_target"],
        masked_ids=source,
        is_masked=is_masked,
        decoder_input_ids=parts["prev_output_tokens"],
        sampling_seed=numbers,
        max_masked=int(is_masked.sum(1).max()),
        num_tokens=int(lengths.sum()),
    )
    batch.corrupted_ids = parts["replaced_input"]
    return batch


def recorded(folder, run: str) -> tuple[list[dict], list[list[dict]], dict]:
    """Facts of each update, the arrays of its micro-batches, and all arrays."""
    facts = json.loads((folder / f"{run}.json").read_text())
    stored = np.load(folder / f"{run}.npz")
    arrays = {name: stored[name] for name in stored.files}

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

    batches = [
        [part(f"u{u}_m{m}_") for m in range(len(fact["micro"]))] for u, fact in enumerate(facts)
    ]
    return facts, batches, arrays


def check_updates(folder, run: str, golden, tmp_path) -> None:
    letter = RUNS[run][0]
    facts, batches, arrays = recorded(folder, run)
    settings = settings_of(letter, run, golden, tmp_path)
    model = build_model(settings, FIRST_SENTINEL)
    load_weights(model, folder / f"checkpoints/{CHECKPOINT[letter]}.pt", settings)
    updates = [
        Update([MicroBatch(recorded_batch(arrays), True) for arrays in micro], Position())
        for micro in batches
    ]

    class Recorder(PretrainingTrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if self.state.global_step > len(seen):
                named = self.model.state_dict().items()
                seen.append({name: weight.double().clone() for name, weight in named})

    seen: list[dict[str, torch.Tensor]] = []
    trainer = Recorder(model, training_arguments(settings), settings=settings, updates=updates)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(logged) == len(seen) == 5
    for fact, line, weights in zip(facts, logged, seen, strict=True):
        loss = sum(micro["loss"] for micro in fact["micro"])
        bits = loss / fact["sample_size_total"] / np.log(2)
        assert line["loss"] == pytest.approx(bits, rel=2e-5)
        assert line["grad_norm"] == pytest.approx(fact["grad_norm_before_clip"], rel=1e-4)
        assert line["learning_rate"] == pytest.approx(fact["lr_used"])
        for name, (want_sum, want_norm) in fact["param_sum_and_norm_after"].items():
            if (own := metro_name(name)) is None:
                continue
            weight = weights[own]
            assert float(weight.norm()) == pytest.approx(want_norm, rel=1e-5, abs=1e-5)
            tolerance = 1e-5 * want_norm * weight.numel() ** 0.5 + 1e-5
            assert abs(float(weight.sum()) - want_sum) <= tolerance, (line["step"], name)
    for name in arrays:
        if name.startswith("final::") and not name.endswith("k_proj.bias"):
            if own := metro_name(name.removeprefix("final::")):
                final = model.state_dict()[own]
                np.testing.assert_allclose(final, arrays[name], rtol=1e-4, atol=1e-5)


def test_updates_equal_the_original(golden, tmp_path):
    """Losses, gradient norms, rates, and each parameter's sum and norm after each of 5 updates."""
    check_updates(golden, "train5_a", golden, tmp_path)


@pytest.mark.parametrize("run", ["train5_b", "train5_c"])
def test_updates_of_the_whole_recording_equal_the_original(run, original, golden, tmp_path):
    """As above, METRO with clipping and T5, both with two micro-batches per update."""
    check_updates(original, run, original, tmp_path)


@pytest.mark.parametrize("run", ["train5_a", "train5_b", "train5_c"])
def test_the_first_updates_hold_the_batches_of_the_original(run, original, golden, tmp_path):
    letter = RUNS[run][0]
    facts, batches, _ = recorded(original, run)
    settings = settings_of(letter, run, original, tmp_path)
    text = PretrainingDataset(
        IndexedFile(original / "wiki2tiny-bin/train"),
        settings,
        "train",
        is_metro=settings.is_metro,
        first_sentinel=FIRST_SENTINEL,
        max_width=settings.max_positions,
    )
    updates = zip(facts, batches, Updates(lambda epoch: text, settings), strict=False)
    for fact, arrays, update in updates:
        found = [micro.batch for micro in update.micro_batches]
        assert [batch.indices.tolist() for batch in found] == [m["ids"] for m in fact["micro"]]
        for batch, want in zip(found, arrays, strict=True):
            source = batch.masked_ids if letter in "ab" else batch.input_ids
            assert np.array_equal(source, want["src_tokens"])
            assert np.array_equal(batch.decoder_input_ids, want["prev_output_tokens"])
            if letter == "c":
                assert np.array_equal(batch.target_ids, want["target"])
            else:
                assert np.array_equal(batch.is_masked, want["generator_target"] != 1)
