"""`metro prompts` as a user meets it."""

import json

import pytest

from tests.cli.test_main import run_metro
from tests.data.prompts.test_template_download import package
from tests.data.prompts.toys import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_rows=5)


def show(world, *more):
    return run_metro(
        "prompts", "show", "--templates", str(world / "templates"), "--data-dir",
        str(world / "data"), "--dataset", "two/sub", *more,
    )  # fmt: skip


def test_list_names_templates_and_what_is_known_of_them(world):
    done = run_metro("prompts", "list", "--templates", str(world / "templates"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == [
        "one: 3 templates",
        "  ask  [Accuracy; answer choices; original task]",
        "  random order  [Accuracy; answer choices; original task]",
    ]
    done = run_metro(
        "prompts", "list", "--mixture", str(world / "mix.yaml"), "--dataset", "two/sub", "--json",
        METRO_TEMPLATES=str(world / "templates"),
    )  # fmt: skip
    listed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(item["task"], item["name"]) for item in listed] == [
        ("two_sub_ask", "ask"),
        ("two_sub_random_order", "random order"),
        ("two_sub_copy", "copy"),
    ]


@pytest.mark.parametrize(
    ("objective", "encoder", "decoder"),
    [
        ("direct", ["{t} Good?"] * 2, ["No", "Yes"]),
        ("channel", ["No", "Yes"], ["{t} Good?"] * 2),
        (
            "flipped",
            ["input: {t}<extra_id_0>\n output: No", "input: {t}<extra_id_0>\n output: Yes"],
            ["<extra_id_0>  Good? "] * 2,
        ),
    ],
)
def test_show_json_is_one_object_per_example(world, objective, encoder, decoder):
    """Oracle: the rows and the template put together by hand."""
    options = ["--prompt", "ask", "--limit", "3", "--split", "train", "--json"]
    done = show(world, *options, "--objective", objective)
    assert done.returncode == 0, done.stderr
    views = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [json.loads(x) for x in (world / "data/two/sub/train.jsonl").read_text().splitlines()]
    assert len(views) == 3
    for number, (view, row) in enumerate(zip(views, rows, strict=False)):
        text = row["text"]
        assert view == {
            "task": "two_sub_ask", "dataset": "two", "subset": "sub", "prompt_name": "ask",
            "split": "train", "row": number, "input": f"{text} Good?",
            "target": ["No", "Yes"][row["label"]], "answer_choices": ["No", "Yes"],
            "label": row["label"], "flipped_input": f"{text}<extra_id_0>",
            "instruction": "<extra_id_0>  Good? ", "objective": objective,
            "encoder_texts": [piece.format(t=text) for piece in encoder],
            "decoder_texts": [piece.format(t=text) for piece in decoder],
        }  # fmt: skip


def test_show_prints_what_the_model_reads_for_people(world):
    done = show(world, "--objective", "flipped", "--prompt", "ask")
    assert "two_sub_ask, validation row 0" in done.stdout
    assert "--- encoder of choice 1" in done.stdout and "(the answer)" in done.stdout
    assert done.stdout.count("--- decoder") == 1


def test_rows_without_an_example_are_named(world):
    done = show(world, "--objective", "flipped", "--prompt", "copy")
    assert done.returncode == 1
    assert "'copy', row 0: no answer choices, which FLIPPED needs" in done.stderr
    assert "no example to show" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "asks"], "two/sub has no template 'asks': did you mean 'ask'?"),
        (["--objective", "up"], "--objective is 'up', and must be one of direct, channel, flipped"),
        (["--split", "test"], "two/sub has no split 'test'"),
        (["--dataset", "two/subs"], "did you mean 'two/sub'?"),
    ],
)
def test_wrong_options_are_one_line(world, options, message):
    done = show(world, *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


def test_real_prompts_equal_recorded_ones(golden, testdata):
    """Oracle: strings recorded from the original implementation."""
    with (golden / "flipped/formats.jsonl").open() as file:
        case = next(
            case for case in map(json.loads, file)
            if (case["subset"], case["template"]) == ("cb", "MNLI crowdsource")
        )  # fmt: skip
    split = case["source_file"].rsplit("/", 1)[1].removesuffix(".jsonl")
    options = ["--templates", str(testdata / "prompts"), "--data-dir", str(testdata / "data")]
    options += ["--prompt", "MNLI crowdsource", "--dataset", "super_glue/cb", "--split", split]
    options += ["--limit", str(case["source_row"] + 1), "--json"]
    for objective in ("direct", "channel", "flipped"):
        done = run_metro("prompts", "show", *options, "--objective", objective)
        view = json.loads(done.stdout.splitlines()[case["source_row"]])
        encoder, decoder = view["encoder_texts"], view["decoder_texts"]
        label = view["label"]
        pair = (encoder[label], decoder[label])
        if objective == "flipped":
            assert pair == (case["flipped_encoder_correct"], case["flipped_target"])
            assert case["flipped_encoder_wrong"] in encoder
        else:
            assert pair == (case[f"{objective}_input"], case[f"{objective}_target"])


def test_wrong_package_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "p.tar.gz").write_bytes(package())
    done = run_metro(
        "templates", "fetch", "--file", str(tmp_path / "p.tar.gz"), METRO_CACHE=str(tmp_path / "c")
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not the pinned package" in done.stderr
    assert not (tmp_path / "c").exists()


def test_missing_templates_name_the_command_that_fetches_them(tmp_path):
    done = run_metro("prompts", "list", METRO_CACHE=str(tmp_path), METRO_TEMPLATES="")
    assert done.returncode == 2 and "metro templates fetch" in done.stderr
