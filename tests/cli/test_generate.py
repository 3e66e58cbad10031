"""`metro generate` gives the recorded answers, whatever way the texts come in.

Oracle, unless a test says otherwise: the original's model and tokenizer, recorded
(``golden/hf_generation.json``).
"""

import io
import json
import shutil
import sys

import pytest
import torch

import metro
from metro.cli.main import load_command
from metro.generation.answers import (
    GenerationSettings,
    answer_texts,
    with_sentinels,
    without_start_and_end,
)
from metro.utils.messages import UserError
from metro.utils.progress import LIFE
from tests.processes import run_python


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "hf_export/t5_prompt_tiny_f"


@pytest.fixture(scope="module")
def recorded(golden):
    models = json.loads((golden / "hf_generation.json").read_text())["models"]
    return models["t5_prompt_tiny_f"]


@pytest.fixture
def generate(capsys, monkeypatch):
    def run(*arguments, stdin: str | None = None) -> list[str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        arguments = [*map(str, arguments), "--device", "cpu"]
        load_command("generate")(arguments, standalone_mode=False)
        return capsys.readouterr().out.splitlines()

    return run


def test_greedy_and_beam_answers_equal_recorded_ones(generate, folder, recorded):
    texts = recorded["sentences"]
    assert generate(folder, *texts, "--max-new-tokens", 39) == recorded["greedy_text"]
    assert len(set(recorded["greedy_text"])) > 2
    one_by_one = generate(folder, *texts, "--max-new-tokens", 39, "--batch-size", 1)
    assert one_by_one == recorded["greedy_text"]
    beams = generate(folder, *texts, "--max-new-tokens", 29, "--num-beams", 4)
    assert beams == recorded["beam4_text"]


def test_texts_come_from_stdin_from_a_file_and_from_json_lines(
    generate, folder, recorded, tmp_path
):
    texts, expected = recorded["sentences"], recorded["greedy_text"]
    piped = "\n".join(texts) + "\n"
    assert generate(folder, stdin=piped) == expected
    assert generate(folder, texts[0], "-", stdin=piped) == [expected[0], *expected]
    plain, rows = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_bytes(piped.replace("\n", "\r\n").encode())
    rows.write_text("".join(json.dumps({"input": text, "task": "a"}) + "\n" for text in texts))
    assert generate(folder, "--input", plain) == generate(folder, "--input", rows) == expected


@pytest.mark.parametrize(
    "option", [{"device": "cpu"}, {"dtype": "float32"}, {"vocab": "tiny_vocab"}]
)
def test_options_of_loading_are_refused_for_a_loaded_model(folder, option):
    [(name, value)] = option.items()
    loaded = metro.load(folder)
    with pytest.raises(UserError, match=f"{name} is '{value}', .* give it to metro.load"):
        metro.generate(loaded, "a", progress=False, **option)


def test_an_empty_line_keeps_its_place(generate, folder, recorded):
    texts, expected = recorded["sentences"], recorded["greedy_text"]
    answers = generate(folder, stdin=f"{texts[0]}\n\n  \n{texts[1]}")
    assert answers == [expected[0], "", "", expected[1]]


def test_json_and_several_answers(generate, folder, recorded):
    beams = ["--num-beams", 4, "--num-answers", 3, "--max-new-tokens", 29]
    lines = generate(folder, *recorded["sentences"], "--json", *beams)
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == recorded["sentences"]
    assert [row["answers"][0] for row in rows] == recorded["beam4_text"]
    assert all(len(row["answers"]) == 3 for row in rows)


def test_samples_depend_on_the_seed_alone(generate, folder, recorded):
    """The caller's random numbers neither matter nor change."""
    options = [folder, *recorded["sentences"], "--sample", "--top-k", 50, "--temperature", 3]
    torch.manual_seed(1)
    first = generate(*options)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert generate(*options) == first
    assert generate(*options, "--seed", 1) != first


def test_the_output_file_appears_complete_or_not_at_all(generate, folder, recorded, tmp_path):
    texts, output = recorded["sentences"], tmp_path / "answers.txt"
    assert generate(folder, *texts, "--output", output) == []
    assert output.read_text().splitlines() == recorded["greedy_text"]
    texts_file = tmp_path / "texts.txt"
    texts_file.write_text("a text")
    with pytest.raises(ValueError, match="is an input of this command"):
        generate(folder, "--input", texts_file, "--output", texts_file, "--overwrite")
    with pytest.raises(ValueError, match="exists.*--overwrite"):
        generate(folder, *texts, "--output", output)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n' * 200 + '{"wrong": 1}\n')
    other = tmp_path / "other.txt"
    with pytest.raises(ValueError, match="line 201 has no text"):
        generate(folder, "--input", broken, "--output", other, "--max-new-tokens", 2)
    names = ["answers.txt", "broken.jsonl", "texts.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    generate(folder, texts[0], "--output", output, "--overwrite")
    assert output.read_text().splitlines() == recorded["greedy_text"][:1]


def test_while_a_file_is_written_stderr_says_how_far_it_is(
    folder, recorded, tmp_path, capsys, monkeypatch
):
    """Oracle: by hand; without patience every answer is announced."""
    monkeypatch.setattr(LIFE, "is_due", lambda seconds=None: seconds is None)
    arguments = [str(folder), *recorded["sentences"][:3], "--max-new-tokens", "2"]
    arguments += ["--device", "cpu", "--output", str(tmp_path / "answers.txt")]
    load_command("generate")(arguments, standalone_mode=False)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"loading {folder}", *(f"texts answered  {n}" for n in (1, 2, 3))]


def test_a_cut_text_is_reported(folder, recorded, capsys):
    long = recorded["sentences"][0] + " and more" * 300
    load_command("generate")(
        [str(folder), long, "--max-new-tokens", "2", "--device", "cpu"], standalone_mode=False
    )
    assert "1 of the texts were cut: max_input_tokens is 512" in capsys.readouterr().err


TWICE = """
import sys
from metro.cli.main import load_command
from metro.utils.messages import UserError
from metro.utils.progress import LIFE

texts = sys.stdin.read().splitlines()
for name in sys.argv[1:]:
    load_command("generate")([name, *texts, "--device", "cpu"], standalone_mode=False)
"""


def test_a_registered_name_and_a_hub_id_load_what_the_hub_cache_holds(folder, recorded, tmp_path):
    """A download as huggingface_hub stores it, and no network."""
    snapshot = tmp_path / "hub/models--gonglinyuan--metro_t0p_base/snapshots/abc"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    hub_id = "gonglinyuan/metro_t0p_base"
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    texts = "\n".join(recorded["sentences"])
    done = run_python("-c", TWICE, "metro_t0p_base", hub_id, input=texts, env=offline)
    assert done.stdout.splitlines() == recorded["greedy_text"] * 2
    assert done.stderr.splitlines() == [
        f"loading {name} ({hub_id} on the Hugging Face hub)" for name in ("metro_t0p_base", hub_id)
    ]


def test_a_fairseq_checkpoint_answers_like_its_export(golden, generate, recorded):
    """Oracle: recorded with the export, whose weights are rounded to float16."""
    found = generate(
        golden / "checkpoints/t5_prompt_tiny_f.pt", *recorded["sentences"],
        "--vocab", golden / "tiny_vocab",
    )  # fmt: skip
    assert found == recorded["greedy_text"]


def test_sentinels_in_a_text_are_read_as_such_when_asked(golden, generate):
    """Oracle: ids put together by hand, through the model's own generate."""

    folder = golden / "hf_export/t5_tiny_c"
    model, tokenizer = metro.load(folder)
    the, lobster = (tokenizer(word)["input_ids"][1:-1] for word in ("the", "lobster"))
    sentinel = tokenizer.convert_tokens_to_ids("<sen001>")
    ids = torch.tensor([[0, *the, sentinel, *lobster, 2]])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    expected = tokenizer.decode([i for i in answer[0, 1:].tolist() if i > 3]).strip()
    text = "The <sen001> lobster"
    assert generate(folder, text, "--sentinels", "--max-new-tokens", 9) == [expected]
    assert sentinel not in tokenizer(text)["input_ids"]  # as the original reads it
    read = with_sentinels(tokenizer)
    assert read(text)["input_ids"] == ids[0].tolist()
    assert tokenizer(text)["input_ids"] != ids[0].tolist()  # the given one has not changed


def test_any_sequence_to_sequence_model_answers(tmp_path, generate):
    """Oracle: the model's own generate on a T5 made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = ["<pad>", "</s>", "<unk>", *"abcdefghij"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = model.generate(tokenizer("a b c", return_tensors="pt")["input_ids"], max_new_tokens=6)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert generate(tmp_path, "a b c", "--max-new-tokens", 6) == [expected.strip()]
    with pytest.raises(ValueError, match="has no <sen001>.*leave sentinels out"):
        generate(tmp_path, "a b c", "--sentinels")


def test_start_and_end_are_cut_off():
    """Oracle: by hand; pretrained-only models end with a sentinel or with </s>."""

    class Config:
        eos_token_id = [1000, 2]

    assert without_start_and_end([1000, 0, 7, 8, 1000, 1, 1], Config) == [0, 7, 8]
    Config.eos_token_id = 2
    assert without_start_and_end([2, 0, 7, 1000, 2, 9], Config) == [0, 7, 1000]


def test_many_windows_keep_their_order(folder):
    """Oracle: the same texts one at a time; three windows of sixteen batches."""

    model, tokenizer = metro.load(folder)
    texts = [" ".join("abcdefg"[: 1 + i % 7]) for i in range(40)]
    settings = GenerationSettings(max_new_tokens=3, batch_size=1)
    single = {
        text: list(answer_texts(model, tokenizer, [text], settings))[0] for text in set(texts)
    }
    assert list(answer_texts(model, tokenizer, iter(texts), settings)) == [single[t] for t in texts]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{folder}", "a", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["{folder}", "a", "--dtype", "int8"], "dtype is 'int8'"),
        (["{folder}", "a", "--max-new-tokens", "2000"], "2000, but the model has 1024 positions"),
        (["{folder}", "a", "--num-answers", "2"], "num_answers is 2 with num_beams 1"),
        (["{folder}", "a", "--top-p", "0.5"], "need sampling: add sample"),
        (["{folder}", "a", "--sample", "--top-p", "1.5"], "top_p is 1.5"),
        (["{folder}", "a", "--sample", "--temperature", "0"], "temperature is 0.0"),
        (["{folder}", "a", "--input", "texts.txt"], "not both"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, arguments, message):
    with pytest.raises(UserError, match=message) as refused:
        arguments = [argument.format(folder=folder) for argument in arguments]
        load_command("generate")(arguments, standalone_mode=False)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_are_refused_in_one_line(generate, folder, tmp_path):
    """Oracle: by hand; as Python passes such bytes on, and as JSON may write them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match="text 2 has half a character"):
        generate(folder, stdin="good\nbad \udcff\udcfe\n")
    with pytest.raises(ValueError, match="text 1 has half a character"):
        generate(folder, "bad \udcff")
    with pytest.raises(ValueError, match="text 2 has half a character"):
        generate("no/model", "--input", rows)  # the file first, then the model
    with pytest.raises(ValueError, match="text 1 has a NUL"):
        metro.generate(folder, ["a\0b"], progress=False)
    for encoding, message in (("utf-16", "wide.txt is UTF-16"), ("utf-16-le", "a NUL")):
        (tmp_path / "wide.txt").write_text("a text", encoding=encoding)
        with pytest.raises(ValueError, match=message):
            generate("no/model", "--input", tmp_path / "wide.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
        generate(folder, "--input", tmp_path / "latin.txt")


def test_no_text_at_a_terminal_is_refused(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(ValueError, match="no text: write it behind the model"):
        load_command("generate")([str(folder)], standalone_mode=False)
