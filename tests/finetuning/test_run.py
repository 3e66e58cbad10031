"""Whole finetuning runs of tiny models."""

import json
import re
import shutil
from pathlib import Path

import pytest

import metro
from metro.data.prompts.stored import PromptedExamples
from metro.finetuning.run import finetune
from metro.utils.messages import UserError
from tests.finetuning.conftest import weights
from tests.finetuning.prepared import write_prepared


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
        objective=objective, max_steps=300, dropout=0.0, eval_steps=300, lr_scheduler="linear"
    )
    result = finetune(chosen)
    assert result.num_updates == 300
    assert least is None or result.metrics[metric] > least
    assert result.metrics[metric] < 1.0001 if least else result.metrics[metric] < 0.6
    assert 0 <= result.metrics["padding_share"] < 0.6
    model, tokenizer = metro.load(result.folder)
    ids = tokenizer("it was lovely How was it?", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=4)[0], skip_special_tokens=True)
    assert objective != "direct" or answer == "Good"
    assert not list(Path(result.folder).glob(".model*"))


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
    held_out = {
        example["input"]
        for path in plain.glob("valid/*")
        for example in PromptedExamples(path / "valid.jsonl")
    }
    shutil.rmtree(plain)
    folder = write_prepared(tmp_path / "data", 60, change=no_options)
    with pytest.raises(ValueError, match="no validation example of"):
        finetune(settings(data=str(folder), objective="flipped", eval_steps=2, sampling="capped"))


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


def test_a_model_whose_configuration_has_no_width_is_finetuned(
    settings, t5_folder, tmp_path, capsys
):
    """BERT reading and writing. Oracle: a rate of 0.1 over the width, which is 16."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(t5_folder)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16)
    bert = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
    for made in (transformers.EncoderDecoderModel(config), tokenizer):
        made.save_pretrained(tmp_path / "bert2bert")
    chosen = settings(model=str(tmp_path / "bert2bert"), learning_rate=None, max_steps=2)
    assert finetune(chosen).num_updates == 2
    assert "learning rate 0.0063, from the model's width" in capsys.readouterr().err
