"""`metro flip` as a user calls it.

Oracles: the scores of the plain computation, and the message that names what is wrong.
"""

import shlex

import pytest
from click.testing import CliRunner

from metro.cli.flip import tie
from metro.cli.main import app
from metro.data.prompts.encoding import PromptEncoder
from metro.evaluation.flip_demo import as_text, flip_choices
from metro.evaluation.settings import FlipSettings
from tests.evaluation.golden import load_exported, score_alone


@pytest.fixture(scope="module")
def model(golden):
    return str(golden / "hf_export/t5_prompt_tiny_f")


def flip(model, text, options, **more):
    return flip_choices(FlipSettings(model=model, input=text, options=options, **more))


def test_scores_are_log_probabilities_of_the_instruction(golden, model):
    """Oracle: all logits, log_softmax, summed over the instruction's tokens."""
    text, instruction = "<extra_id_0> so it is<extra_id_1>", "<extra_id_0> say <extra_id_1> of it"
    shown = flip(model, text, ["yes", "no"], instruction=instruction, max_new_tokens=5)
    network, tokenizer = load_exported(golden, "t5_prompt_tiny_f")
    encoder = PromptEncoder(tokenizer)
    [target] = encoder.targets([instruction])
    for row in shown.rows:
        [source] = encoder.sources([f"input: {text}\n output: {row.choice}"])
        assert row.score == pytest.approx(score_alone(network, (source, target)), abs=1e-4)
    assert shown.winner == max(shown.rows, key=lambda row: row.score).choice
    assert sum(row.share for row in shown.rows) == pytest.approx(1)


def test_a_long_input_or_instruction_is_said_to_be_cut(model):
    """Oracle: the lengths of T5 models, 512 and 256 tokens."""
    shown = flip(model, "so it is " * 300, ["yes", "no"], instruction="say " * 300)
    assert len(shown.notes) == 2 and all("was cut at" in note for note in shown.notes)
    assert not flip(model, "so it is", ["yes", "no"], instruction="say").notes


def test_without_an_instruction_the_likeliest_suggestion_is_taken(model):
    """Oracle: the instruction is one of those generated; the winner has the best score."""
    shown = flip(model, "so it is", ["yes", "no"], max_new_tokens=6)
    assert shown.instruction in [row.generated for row in shown.rows]
    assert shown.winner == max(shown.rows, key=lambda row: row.score).choice


def test_a_suggestion_has_no_start_symbol(golden):
    """Oracle: by hand; METRO's models write `<s>` first."""
    _, tokenizer = load_exported(golden, "metro_tiny_a")
    ids = tokenizer("the sea").input_ids
    assert tokenizer.decode(ids).startswith("<s>")
    assert as_text(tokenizer, ids).strip() == "the sea"


def test_the_command_prints_options_and_winner(model):
    """Oracle: the winner computed by the library."""
    arguments = ["--input", "so it is", "--options", "yes", "no", "--instruction", "true ?"]
    done = CliRunner().invoke(app, ["flip", model, *arguments])
    assert done.exit_code == 0, done.output
    winner = flip(model, "so it is", ["yes", "no"], instruction="true ?").winner
    assert f"answer: {winner}" in done.output
    assert "instruction: <extra_id_0> true ?" in done.output


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([-3.0, -2.0], ""),
        ([-3.0, -3.0], " (a tie: 2 answer choices differ by less than 0.001)"),
        ([-3.0, -3.0004, -9.0, -3.0002], " (a tie: 3 answer choices differ by less than 0.001)"),
        ([-3.0, -3.002, -9.0], ""),
    ],
)
def test_a_tie_is_called_one(scores, said):
    """Oracle: the differences of the scores."""
    assert tie(scores) == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--input ' ' --options a b", "--input is empty"),
        ("--input x --options a", "give at least two"),
        ("--input x --options a ' '", "one of --options is empty"),
        ("--input x --options Yes yes", "are the same to the model"),
        ("--input x --options yes yes", "'yes' and 'yes' are the same to the model"),
        (
            "--input x --options a b --instruction 'Title: <extra_id_1> c'",
            "--input has the sentinels <extra_id_0>, --instruction <extra_id_1>",
        ),
        (
            "--input <extra_id_2>x<extra_id_0> --options a b --instruction '<extra_id_0> c'",
            "--input has the sentinels <extra_id_0>, <extra_id_2>, --instruction <extra_id_0>;",
        ),
        ("--input x --options a \udcff", "text 3 has half a character"),
        ("--input x --options a b --instruction '<extra_id_0> '", "without text beside sentinels"),
    ],
)
def test_bad_input_is_one_clear_message(model, arguments, message):
    """Oracle: the message."""
    done = CliRunner().invoke(app, ["flip", model, *shlex.split(arguments)])
    assert isinstance(done.exception, ValueError), done.output
    assert message in str(done.exception)
