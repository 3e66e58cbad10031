"""Whole finetuning runs of tiny models."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import metro
from metro.finetuning.run import finetune
from metro.finetuning.settings import FinetuningSettings
from metro.finetuning.trainer import FinetuningTrainer
from metro.training.output_folder import TRAINER_STATE, complete_checkpoints
from metro.utils.files import read_json
from metro.utils.locks import locked
from metro.utils.messages import UserError
from tests.finetuning.prepared import write_prepared
from tests.processes import METRO, run_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data", 120)


@pytest.fixture
def settings(t5_folder, folder, tmp_path):
    def make(name: str = "out", **options) -> FinetuningSettings:
        common = dict(model=str(t5_folder), data=str(folder), output_dir=str(tmp_path / name))
        common |= dict(batch_size=16, max_steps=12, learning_rate=1e-2, logging_steps=4)
        common |= dict(save_steps=0, use_cpu=True, report_to="none")
        return FinetuningSettings(**{**common, **options})

    return make


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same(one, other, **tolerance) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_a_folder_that_another_run_trains_in_is_refused(settings):
    """Oracle: nothing is written there meanwhile, and the same call works afterwards."""
    chosen = settings(max_steps=1)
    folder = Path(chosen.output_dir)
    with locked(folder, inside=True), pytest.raises(UserError, match="is being written by"):
        finetune(chosen)
    assert list(folder.iterdir()) == []
    assert finetune(chosen).num_updates == 1
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(
    ("objective", "metric", "least"),
    [
        ("direct", "eval_exact_match", 0.9),  # chance 0.5 and 0.33
        ("flipped", "eval_ranked_right", 0.8),  # chance 0.5
        ("direct+ul", "eval_ranked_right", 0.9),
        ("channel", "token_nll", None),
    ],
)
def test_every_objective_learns_and_saves_a_model(settings, objective, metric, least):
    """Held-out rows well above chance after a few seconds; the folder loads as it is."""
    chosen = settings(
        objective=objective, max_steps=200, dropout=0.0, eval_steps=200, lr_scheduler="linear"
    )
    result = finetune(chosen)
    assert result.num_updates == 200
    assert least is None or result.metrics[metric] > least
    assert result.metrics[metric] < 1.0001 if least else result.metrics[metric] < 0.6
    assert 0 <= result.metrics["padding_share"] < 0.6
    model, tokenizer = metro.load(result.folder)
    ids = tokenizer("it was lovely How was it?", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=4)[0], skip_special_tokens=True)
    assert objective != "direct" or answer == "Good"
    assert not list(Path(result.folder).glob(".model*"))


@pytest.mark.parametrize("objective", ["direct", "flipped"])
def test_a_resumed_run_is_bit_exact(settings, objective):
    """With dropout and across the end of an epoch (15 updates), stopped in the middle of one."""
    common = dict(objective=objective, save_steps=7, dropout=0.1, save_total_limit=None)
    whole = finetune(settings("whole", **common, max_steps=22))
    finetune(settings("halves", **common, max_steps=7))
    resumed = finetune(settings("halves", **common, max_steps=22))
    assert_same(whole.folder, resumed.folder)
    assert whole.metrics["likelihood" if objective == "flipped" else "token_nll"] == pytest.approx(
        resumed.metrics["likelihood" if objective == "flipped" else "token_nll"], abs=1e-6
    )


def test_cut_inputs_are_counted_for_each_task(settings, capsys):
    """Oracle: the tokenizer's own lengths of the examples of one epoch; the setting is kept."""
    options = dict(max_input_length=12, logging_steps=5, num_workers=1)
    chosen = settings(**options, max_steps=15, truncation_side="left")
    result = finetune(chosen)
    tokenizer = metro.load(result.folder)[1]
    expected = {}
    for path in sorted(Path(chosen.data).glob("train/*/train.jsonl")):
        lengths = [len(tokenizer(json.loads(line)["input"]).input_ids) for line in path.open()]
        expected[path.parent.name] = sum(length > 12 for length in lengths)
    said = capsys.readouterr().err
    [line] = [line for line in said.splitlines() if "sources cut at 12 tokens" in line]
    assert "losing the beginning" in line
    counts = {name: int(n) for n, name in re.findall(r"(\d+) of (\w+)", line)}
    assert counts and set(counts) <= set(expected)
    assert all(counts[name] <= expected[name] for name in counts)
    assert sum(counts.values()) == result.metrics["cut_sources"] > 0
    with pytest.raises(ValueError, match="truncation_side was 'left' and is 'right'"):
        finetune(settings(**options, max_steps=16))
    earlier = Path(chosen.output_dir) / "finetune.yaml"  # as of a version without the option
    text = earlier.read_text().replace("truncation_side: left\n", "")
    earlier.write_text(text)
    with pytest.raises(ValueError, match="truncation_side was 'right' and is 'left'"):
        finetune(chosen)


def test_a_run_that_was_cut_off_while_saving_goes_on_from_the_checkpoint_before(settings):
    chosen = settings(save_steps=4, save_total_limit=None)
    first = finetune(chosen)
    expected = weights(first.folder)
    out = Path(chosen.output_dir)
    (out / "checkpoint-12" / "trainer_state.json").unlink()  # written last
    (out / "config.json").unlink()
    (out / "trainer_state.json").unlink()
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-4", "checkpoint-8"]
    again = finetune(chosen)
    assert again.num_updates == 12
    for name, tensor in weights(again.folder).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("num_moved", [0, 1, 4])
def test_a_run_cut_off_while_its_model_is_moved_ends_as_if_left_alone(
    settings, capsys, monkeypatch, num_moved
):
    """Oracle: the run left alone. Without checkpoints, yet nothing is trained again."""
    whole = finetune(settings("whole", save_steps=0, max_steps=3))
    finetune(settings(save_steps=0, max_steps=2))
    replace, moves = os.replace, iter(range(num_moved))

    def replace_some(source, target):
        is_move = Path(source).parent.name == ".model.partial" and Path(target).parent.name == "out"
        if is_move and next(moves, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings(save_steps=0, max_steps=3))
    monkeypatch.undo()
    capsys.readouterr()
    again = finetune(settings(save_steps=0, max_steps=3))
    assert "nothing to do" in capsys.readouterr().err and again.num_updates == 3
    assert_same(again.folder, whole.folder)
    assert not (again.folder / ".model.partial").exists()


def test_a_changed_byte_of_a_run_is_named(settings):
    """Oracle: by hand: a digit or byte in the middle becomes another, in one file after another."""
    out = finetune(settings(save_steps=2, max_steps=2)).folder
    states = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for name, steps in (
        *((f"checkpoint-2/{state}", 4) for state in (*states, "model.safetensors")),
        *(("inputs.json", 4), ("trainer_state.json", 2), ("model.safetensors", 2)),
    ):
        content = bytearray((out / name).read_bytes())
        digits = [i for i, byte in enumerate(content) if byte in b"12345678"]
        is_text = name.endswith(".json")
        content[digits[len(digits) // 2] if is_text else len(content) // 2] ^= 1
        before = (out / name).read_bytes()
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{Path(name).name} was damaged"):
            finetune(settings(save_steps=2, max_steps=steps))
        if name == "model.safetensors":
            with pytest.raises(UserError, match="was damaged.*delete .*checksums"):
                metro.load(out)
        (out / name).write_bytes(before)
    assert finetune(settings(save_steps=2, max_steps=4)).num_updates == 4


def test_a_finished_run_started_again_trains_nothing_and_goes_on_where_more_is_asked_for(
    settings, capsys
):
    """Oracle: the file's time and content."""
    first = finetune(settings(save_steps=6))
    before = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = finetune(settings(save_steps=6))
    assert "nothing to do" in capsys.readouterr().err
    assert again.num_updates == 12 and again.metrics == first.metrics
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == before
    more = finetune(settings(save_steps=6, max_steps=14))
    assert more.num_updates == 14
    whole = finetune(settings("whole", max_steps=14))
    assert_same(more.folder, whole.folder)


def test_other_settings_do_not_continue_a_run(settings):
    finetune(settings(save_steps=6))
    with pytest.raises(ValueError, match="learning_rate was 0.01 and is 0.5"):
        finetune(settings(save_steps=6, learning_rate=0.5))
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(settings(resume="never"))
    with pytest.raises(ValueError, match="not a complete checkpoint-N folder"):
        finetune(settings(resume="nowhere"))


@pytest.mark.parametrize("content", ["a: [", "", "- 1", "text"])
def test_damaged_settings_of_the_earlier_run_are_named(settings, tmp_path, content):
    checkpoint = tmp_path / "out/checkpoint-6"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / "out/finetune.yaml").write_text(content)
    with pytest.raises(UserError, match="finetune.yaml"):
        finetune(settings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "foo"}, "foo'? is not a valid SchedulerType"),
        ({"optimizer": "foo"}, "foo'? is not a valid OptimizerNames"),
        ({"report_to": "foo"}, "foo is not supported"),
    ],
)
def test_names_that_the_trainer_does_not_know_are_one_line(settings, options, message):
    with pytest.raises(UserError, match=message):
        finetune(settings(**options))


def test_a_folder_of_something_else_is_left_alone(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not of metro finetune"):
        finetune(settings())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_accumulated_micro_batches_are_one_batch(settings):
    """Oracle: the same examples in one batch. The loss is a mean over all of an update's tokens."""
    common = dict(objective="flipped", dropout=0.0, batching="random", max_steps=5, optimizer="sgd")
    one = finetune(settings("one", **common, batch_size=16))
    four = finetune(settings("four", **common, batch_size=4, gradient_accumulation_steps=4))
    assert_same(one.folder, four.folder, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_two_processes_train_the_model_of_one(settings, tmp_path, mean):
    """Oracle: one process that accumulates what the two do; torchrun on the CPU."""
    common = dict(objective="flipped", dropout=0.0, batching="random", max_steps=6, mean=mean)
    common |= dict(eval_steps=6, optimizer="sgd", learning_rate=0.1)
    one = finetune(settings("one", **common, batch_size=4, gradient_accumulation_steps=2))
    use_cpu = torch.accelerator.is_available()  # where there is none, it needs no saying
    options = settings("two", **common, batch_size=4, use_cpu=use_cpu).as_dict()
    (tmp_path / "two.yaml").write_text(
        "".join(f"{k}: {v}\n" for k, v in options.items() if v is not None and k != "adam_betas")
    )
    command = [*"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    command += [*METRO, "finetune", "--config", str(tmp_path / "two.yaml")]
    done = run_python(*command, env={"OMP_NUM_THREADS": "1"})
    assert_same(one.folder, tmp_path / "two", rtol=1e-4, atol=1e-5)
    shown = [line for line in done.stderr.splitlines() if "eval_loss" in line]
    assert len(shown) == 1  # one process speaks
    value = float(shown[0].split("eval_loss ")[1].split()[0])
    assert value == pytest.approx(one.metrics["eval_loss"], rel=1e-3)


def test_bf16_and_gradient_checkpointing_run(settings):
    for name, objective in (("a", "flipped"), ("b", "direct+ul")):
        chosen = settings(
            name, objective=objective, precision="bf16", gradient_checkpointing=True, max_steps=3
        )
        result = finetune(chosen)
        assert result.num_updates == 3
        assert all(t.dtype == torch.float32 for t in weights(result.folder).values())


def test_gradient_checkpointing_changes_no_number(settings):
    # not Adafactor, whose steps have one size however small a gradient and its rounding are
    common = dict(objective="flipped", dropout=0.0, max_steps=4, optimizer="sgd")
    plain = finetune(settings("plain", **common))
    saving = finetune(settings("saving", **common, gradient_checkpointing=True))
    assert_same(plain.folder, saving.folder, rtol=1e-5, atol=1e-6)


def test_tensorboard_has_the_logged_numbers(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = finetune(settings(objective="flipped", report_to="tensorboard", eval_steps=12))
    (events,) = result.folder.glob("runs/*/events*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    names = "loss likelihood unlikelihood right_prob wrong_prob ranked_right padding_share"
    assert {f"train/{name}" for name in names.split()} <= tags
    assert {"eval/loss", "eval/ranked_right"} <= tags


def test_a_pretraining_checkpoint_of_the_original_becomes_a_prompted_model(settings, golden):
    """The decoder starts with </s>, the auxiliary model is gone, the folder carries its code."""
    result = finetune(
        settings(
            model=str(golden / "checkpoints/metro_tiny_a.pt"),
            vocab=str(golden / "tiny_vocab"),
            objective="flipped",
            max_steps=4,
            learning_rate=1e-3,
        )
    )
    assert (result.folder / "modeling_metro_t5.py").is_file()
    model, tokenizer = metro.load(result.folder)
    assert (
        model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 2
    )
    assert not [name for name in weights(result.folder) if "auxiliary" in name or "rtd" in name]


def test_binarised_prompts_are_refused_with_the_remedy(settings, tmp_path):
    (tmp_path / "ids").mkdir()
    manifest = {"format": "fairseq", "mixture": "mix", "splits": {"train": {}}}
    (tmp_path / "ids/prompts.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="prepare them with metro prepare-prompts --format jsonl"):
        finetune(settings(data=str(tmp_path / "ids")))


def test_evaluation_without_an_example_of_use_says_so(settings, tmp_path):
    """Validation examples without options under flipped."""

    def no_options(example):
        return {**example, "answer_choices": None} if example["input"] in held_out else example

    plain = write_prepared(tmp_path / "plain", 60)
    from metro.data.prompts.stored import PromptedExamples

    held_out = {
        example["input"]
        for path in plain.glob("valid/*")
        for example in PromptedExamples(path / "valid.jsonl")
    }
    shutil.rmtree(plain)
    folder = write_prepared(tmp_path / "data", 60, change=no_options)
    with pytest.raises(ValueError, match="no validation example of"):
        finetune(settings(data=str(folder), objective="flipped", eval_steps=2, sampling="capped"))


def change_model(source, place, change):
    model, tokenizer = metro.load(source)
    with torch.no_grad():
        change(model)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_a_run_does_not_go_on_with_another_model_or_other_data(settings, folder, tmp_path):
    """Oracle: by hand: one number of a weight, one example; unfinished and finished runs alike."""
    places = [shutil.copytree(place, tmp_path / f"in{number}") for number, place in
              enumerate((settings().model, folder))]  # fmt: skip
    chosen = dict(model=str(places[0]), data=str(places[1]), save_steps=1, max_steps=1)
    finetune(settings(**chosen))

    def nudge(model):
        model.shared.weight[20, 3] += 0.5

    for max_steps in (1, 2):
        now = {**chosen, "max_steps": max_steps}
        change_model(settings().model, places[0], nudge)
        with pytest.raises(UserError, match="run on other weights of .*in0: changed or replaced"):
            finetune(settings(**now))
        shutil.copytree(settings().model, places[0], dirs_exist_ok=True)
        with next(places[1].glob("train/*/train.jsonl")).open("a") as file:
            file.write("\n")
        with pytest.raises(UserError, match="run on other data of .*in1: changed or replaced"):
            finetune(settings(**now))
        shutil.copytree(folder, places[1], dirs_exist_ok=True)
    assert finetune(settings(**chosen)).num_updates == 1
    moved = places[0].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model was .*in0"):
        finetune(settings(**{**chosen, "model": str(moved)}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", "the loss is (nan|inf) after update 4: the training diverged"),
        ("weights", "the weight .* of the model has numbers that are not finite"),
        ("held-out", "the loss on held-out examples is (nan|inf) after update 2, first in a batch"),
    ],
)
def test_a_training_that_diverges_stops_and_writes_no_nan(settings, what, message):
    """Oracle: a learning rate of 1e30; the message, and what lies in the folder."""
    options = {"loss": {}, "weights": {"logging_steps": 50, "save_steps": 2}}
    options["held-out"] = {"logging_steps": 50, "eval_steps": 1}
    huge = dict(optimizer="sgd", learning_rate=1e30, max_grad_norm=0.0, max_steps=6)
    with pytest.raises(UserError, match=message):
        finetune(settings(**huge, **options[what]))
    out = Path(settings().output_dir)
    assert {path.name for path in out.iterdir()} <= {"finetune.yaml", "inputs.json", "runs"}


def test_models_with_short_position_tables_are_cut_and_padding_must_be_a_token(
    settings, t5_folder, tmp_path
):
    """Oracle: it trains, with inputs of up to 20 tokens and 10 positions; the message."""
    import transformers

    _, tokenizer = metro.load(t5_folder)
    sides = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers",)}
    sides |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=16, max_position_embeddings=10, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, decoder_start_token_id=1, **sides,
        encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    for pad in (0, 1):
        model.config.pad_token_id = pad
        model.save_pretrained(tmp_path / f"bart{pad}")
        tokenizer.save_pretrained(tmp_path / f"bart{pad}")
    chosen = dict(max_steps=2, eval_steps=2, learning_rate=1e-3)
    assert finetune(settings(model=str(tmp_path / "bart0"), **chosen)).num_updates == 2
    with pytest.raises(UserError, match="its pad_token_id is 1, and must be a token of its own"):
        finetune(settings("other", model=str(tmp_path / "bart1"), **chosen))


@pytest.mark.parametrize(
    ("training", "batch", "before"),
    [(True, 2, 0), (True, 22, 5), (False, 2, 4)],
    ids=["in the first update", "between micro-batches", "in an evaluation"],
)
def test_a_stop_is_at_once_and_the_resumed_run_is_bit_exact(
    settings, monkeypatch, training, batch, before
):
    """SIGTERM; four micro-batches, dropout. Oracle: a run left alone; the batches counted."""
    common = dict(gradient_accumulation_steps=4, batch_size=4, dropout=0.1, max_steps=8)
    common |= dict(eval_steps=4, eval_batch_size=2, logging_steps=1, save_steps=100)
    whole = finetune(settings("whole", **common))
    seen = []
    loss = FinetuningTrainer._loss

    def count_and_stop(self, *args):
        seen.append(self.model.training)
        if seen.count(training) == batch and seen[-1] == training:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args)

    stopped = settings("stopped", **common)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuningTrainer, "_loss", count_and_stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(stopped)
    assert seen.count(training) == batch
    checkpoints = [path.name for path in complete_checkpoints(Path(stopped.output_dir))]
    assert checkpoints == ([f"checkpoint-{before}"] if before else [])
    resumed = finetune(stopped)
    assert_same(whole.folder, resumed.folder)
    losses = [
        [line["loss"] for line in read_json(run.folder / TRAINER_STATE)["log_history"][:-1]
         if "loss" in line]
        for run in (whole, resumed)
    ]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 8
