"""Finetuning on own rows: the best model is kept, and adapters are models like others.

Oracle, unless a test says otherwise: `metro.evaluate` on the same validation rows.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import metro
from metro.cli.main import load_command
from metro.data.prompts.stored import PromptedExamples
from metro.evaluation.evaluate import evaluate_models
from metro.evaluation.settings import EvaluationSettings
from metro.finetuning.defaults import default_updates
from metro.finetuning.run import finetune
from metro.finetuning.settings import FinetuningSettings
from metro.models.source import trained_choices
from metro.utils.messages import UserError
from metro.utils.progress import Progress
from tests.finetuning.prepared import sentiment

ASK = "{{text}} How was it?||| {{label}}"


def rows_of(numbers):
    made = [sentiment(number, 0) for number in numbers]
    return [{"text": e["input"].removesuffix(" How was it?"), "label": e["target"]} for e in made]


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def mails(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "mails"
    folder.mkdir()
    write_csv(folder / "train.csv", rows_of(range(48)))
    write_csv(folder / "dev.csv", rows_of(range(100, 120)))
    return folder


@pytest.fixture
def settings(t5_folder, mails, tmp_path):
    def make(name="out", **options):
        common = dict(model=str(t5_folder), data=str(mails), output_dir=str(tmp_path / name))
        common |= dict(template=[ASK], learning_rate=1e-2, dropout=0.0, max_steps=40, eval_steps=10)
        common |= dict(early_stopping=2, use_cpu=True, report_to="none", warmup_steps=0)
        return FinetuningSettings.of(**{**common, **options})

    return make


def measure(folder, mails, out, **options):
    found = metro.evaluate(
        str(folder),
        **{"data": str(mails), "template": [ASK], "out": out, "progress": False, **options},
    )
    return found.summary.method, found.accuracies["mails"]


def accuracies(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["eval_accuracy"] for line in history if "eval_accuracy" in line]


@pytest.mark.parametrize(
    ("objective", "lora"),
    [
        *[("direct", False), ("flipped", False), ("direct", True), ("channel", True)],
        *[("flipped", True), ("direct+ul", True)],
    ],
)
def test_the_best_model_is_kept_and_is_as_good_as_it_said(
    settings, mails, tmp_path, capsys, objective, lora
):
    patience = 3 if lora else 2
    chosen = settings(objective=objective, lora=lora, early_stopping=patience, max_steps=60)
    result = finetune(chosen)
    assert f"answer choices, the values of 'label' in {mails}: Bad, Good" in capsys.readouterr().err
    said = accuracies(result.folder)
    method = "direct" if objective == "direct+ul" else objective
    assert measure(result.folder, mails, tmp_path / "results") == (method, max(said))
    assert max(said) > 0.9
    first_best = said.index(max(said))
    assert len(said) == min(6, first_best + 1 + patience)
    assert (result.folder / ("adapter_config.json" if lora else "config.json")).is_file()
    assert (result.folder / "model.safetensors").is_file() is not lora
    assert finetune(chosen) == result and "nothing to do" in capsys.readouterr().err


def test_the_method_that_a_model_was_trained_for_is_its_default(settings, mails, tmp_path, capsys):
    """Oracle: the objective; the log of each command, and numbers of the method given by name.

    It is still known after a merge, and of a checkpoint.
    """
    folder = finetune(settings(objective="channel", max_steps=10, save_steps=10)).folder
    metro.load(folder)
    for model in (folder, folder / "checkpoint-10"):
        options = dict(input=str(mails / "dev.csv"), template=[ASK], options=["Bad", "Good"])
        [own, given, other] = [
            [each.log_probabilities for each in metro.rank(model=str(model), **options, **more)[0]]
            for more in ({}, {"method": "channel"}, {"method": "direct"})
        ]
        assert own == given != other
        said = capsys.readouterr().err
        assert said.count("method channel, which the model was trained for") == 1
    assert measure(folder, mails, tmp_path / "direct", method="direct")[0] == "direct"
    load_command("generate")([str(folder), "it was good"], standalone_mode=False)
    assert "trained for method channel: it writes what is asked" in capsys.readouterr().err


def test_examples_are_those_of_prepare_prompts(settings, mails):
    """Oracle: prompts written by hand."""
    folder = finetune(settings(max_steps=1, early_stopping=None, eval_steps=None)).folder
    for side, numbers in (("train", range(48)), ("valid", range(100, 120))):
        [path] = (folder / "data" / side).iterdir()
        for made, number in zip(PromptedExamples(path), numbers, strict=True):
            expected = sentiment(number, 0)
            assert {name: made[name] for name in expected} == expected


def test_updates_are_ten_passes_over_the_rows_and_at_least_two_hundred(settings):
    """Oracle: by hand, of 48 training rows, in batches of 16 where nothing is said."""
    chosen = settings(max_steps=1, early_stopping=None, eval_steps=None)
    folder = finetune(chosen).folder / "data"
    for options, processes, expected in [
        ({}, 1, 200),
        ({"batch_size": 1}, 1, 480),
        ({"batch_size": 1}, 2, 240),
        ({"batch_size": 1, "gradient_accumulation_steps": 7}, 1, 200),
        ({"batch_size": 1, "gradient_accumulation_steps": 2}, 1, 240),
    ]:
        assert default_updates(folder, settings(**options), processes) == expected


def test_without_validation_rows_the_schedule_is_fixed_and_said(settings, mails, capsys):
    result = finetune(settings(data=str(mails / "train.csv"), max_steps=12, save_steps=8))
    assert result.num_updates == 12 and "eval_loss" not in result.metrics
    assert (result.folder / "checkpoint-8/model.safetensors").exists()
    said = capsys.readouterr().err
    assert "48 rows for training, none for validation" in said
    assert "no rows for validation: 12 updates, the last model kept" in said


def test_own_rows_begin_from_their_configuration_and_a_rate_for_the_width(
    settings, mails, t5_folder, tmp_path, capsys
):
    """Oracle: the file; d_model is 32."""
    given = dict(model=str(t5_folder), data=str(mails), output_dir=str(tmp_path / "out"))
    chosen = FinetuningSettings.of(template=[ASK], max_steps=2, **given)
    shipped = FinetuningSettings.read("own_rows")
    assert all(
        getattr(chosen, name) == value for name, value in shipped.items() if name != "max_steps"
    )
    assert FinetuningSettings.of(**given).max_steps == -1
    finetune(FinetuningSettings.of(chosen, use_cpu=True, report_to="none", lora=True))
    assert "learning rate 0.0094, from the model's width" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_of_own_rows_is_bit_exact(settings, lora):
    """Dropout, too; the checkpoint is that of the best evaluation so far."""
    common = dict(lora=lora, dropout=0.1, lr_scheduler="constant", early_stopping=5, eval_steps=4)
    whole = finetune(settings("whole", **common, max_steps=12))
    finetune(settings("halves", **common, max_steps=4))
    again = finetune(settings("halves", **common, max_steps=12))
    assert accuracies(again.folder) == accuracies(whole.folder)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    one, other = (load_file(Path(run.folder) / name) for run in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_an_adapter_of_metro_keeps_the_start_symbol_that_it_was_trained_with(
    settings, golden, tmp_path
):
    """Of a model that is only pretrained, whose decoder starts with another one.

    Oracle: the end symbol, as of METRO-T0, and the number of trained weights by hand.
    """
    base = tmp_path / "base"
    shutil.copytree(golden / "hf_export/metro_tiny_a", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 5}))
    result = finetune(
        settings(model=str(base), lora=True, lora_r=2, max_steps=3, early_stopping=None)
    )
    adapted, tokenizer = metro.load(result.folder)
    before, _ = metro.load(base)
    assert before.config.decoder_start_token_id != tokenizer.eos_token_id
    assert adapted.config.decoder_start_token_id == tokenizer.eos_token_id
    assert adapted.generation_config.decoder_start_token_id == tokenizer.eos_token_id
    trained = load_file(result.folder / "adapter_model.safetensors")
    size = sum(
        2 * (layer.in_features + layer.out_features)
        for name, layer in before.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    )
    assert sum(tensor.numel() for tensor in trained.values()) == size


def test_own_rows_are_evaluated_with_the_answer_choices_of_the_finetuning(
    settings, mails, tmp_path, capsys
):
    """Oracle: the three labels by hand, of which the test rows have two."""
    rows = [
        {**row, "label": "So"} if n % 3 == 0 else row for n, row in enumerate(rows_of(range(24)))
    ]
    train = write_csv(tmp_path / "three.csv", rows)
    once = dict(max_steps=1, early_stopping=None, eval_steps=None)
    folder = finetune(settings(data=str(train), **once)).folder
    adapter = finetune(settings("lora", data=str(train), lora=True, **once)).folder
    test = mails / "dev.csv"

    def scores(models, **more):
        given = dict(data=str(test), template=[ASK], out=tmp_path / "runs", overwrite=True, **more)
        capsys.readouterr()
        [done] = evaluate_models(EvaluationSettings.of(models=models, **given), Progress())
        [file] = done.folder.rglob("scores/*/*.jsonl")
        return len(json.loads(file.read_text().splitlines()[0])["scores"])

    for model in (str(folder), str(adapter)):
        assert scores([model]) == 3
        said = capsys.readouterr().err
        assert "choices of 'label', those of the finetuning: Bad, Good, So (--options gives" in said
        assert scores([model], options=["Bad", "Good"]) == 2
    other = finetune(settings("other", **once)).folder
    with pytest.raises(UserError, match="out and .*other were finetuned with different answer cho"):
        scores([str(folder), str(other)])
    again = finetune(
        settings(
            "again",
            model=str(folder),
            input_field="text",
            template=None,
            target_field="label",
            options=["x", "Bad"],
            **once,
        )
    ).folder
    assert trained_choices(again) == {"label": ["x", "Bad"]}


def test_labels_that_are_the_same_to_the_model_are_refused(settings, golden, mails, tmp_path):
    """The toy model's vocabulary is lowercase."""
    model = str(golden / "hf_export/metro_tiny_a")
    message = "'Good' and 'good' are the same to the model"
    with pytest.raises(UserError, match=message):
        finetune(settings(model=model, options=["Good", "good"]))
    with pytest.raises(UserError, match=message):
        measure(model, mails, tmp_path / "runs", options=["Good", "good"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such", "template": ["{{boddy}} ||| {{label}}"]}, "has no field 'boddy'"),
        ({"model": "no/such", "template": ["{{text} ||| {{label}}"]}, "is not a template"),
        (
            {"model": "no/such", "template": ["{{text}} ||| {{lable}}"], "objective": "flipped"},
            "has no field 'lable': it has label, text",
        ),
        ({"data": "./nofolder"}, "there is no file nofolder"),
        (
            {"data": "t0", "template": None, "valid_fraction": 0.1},
            "valid_fraction is for rows of your own",
        ),
        ({"template": None}, "holds rows: say how to ask, with --template"),
        ({"template": ["{{text}} ? ||| {{label}} !"], "objective": "flipped"}, "give --options"),
        ({"eval_steps": None}, "early_stopping needs evaluations"),
        ({"valid_fraction": 1.0}, "valid_fraction is 1.0; use 0 up to less than 1"),
        ({"split_field": "side"}, "has the splits dev, train: choose one"),
    ],
)
def test_settings_that_do_not_fit_own_rows_are_named(settings, options, message):
    with pytest.raises(UserError, match=message):
        finetune(settings(**options))
