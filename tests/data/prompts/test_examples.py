"""Rows to examples: bad input is counted and named; draws and limits depend on rows alone."""

from metro.data.prompts.stored import PromptedExamples
from tests.data.prompts.toys import prepare, random_rows, write_rows, write_templates


def test_random_draws_depend_on_seed_template_and_row_alone(world, tmp_path):
    def drawn(**options):
        result, _ = prepare(world, tmp_path / f"out{len(list(tmp_path.iterdir()))}", **options)
        examples = PromptedExamples(result.folder / "train/one_random_order")
        return {example["row"]: example["input"].split()[0] for example in examples}

    whole, part, other = drawn(), drawn(limit=30), drawn(seed=1)
    assert len(set(whole.values())) == 3
    assert all(whole[row] == word for row, word in part.items()) and len(part) == 30
    assert whole != other


def test_draws_in_the_options_differ_between_rows(tmp_path):
    """Claim: options drawn at random are not the same draw for every row."""
    choices = "{{ ['yes', 'sure', 'true'] | choice }} ||| no"
    write_templates(
        tmp_path / "templates", "toy", {"ask": (choices, "{{text}}? ||| {{answer_choices[0]}}")}
    )
    write_rows(tmp_path / "data", "toy", "train", random_rows(0, 40))
    (tmp_path / "mix.yaml").write_text("datasets: [toy]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    examples = PromptedExamples(result.folder / "train/toy_ask")
    assert {example["target"] for example in examples} == {"yes", "sure", "true"}
    assert all(example["label"] == 0 for example in examples)


def test_limit_spreads_over_the_rows(world, tmp_path):
    """Datasets sorted by label would otherwise lose a label."""
    result, _ = prepare(world, tmp_path / "out", limit=10, valid_limit=4)
    assert PromptedExamples(result.folder / "train/one_ask").rows.tolist() == list(
        range(0, 300, 30)
    )
    assert PromptedExamples(result.folder / "valid/one_ask").rows.tolist() == [0, 10, 20, 30]


def test_bad_rows_are_counted_and_named(tmp_path):
    """Every kind of bad input once or twice; what remains is right."""
    templates = {
        "options": ("no ||| yes", "{{text}}{% if label is not none %} ||| {{answer_choices[label]}}"
                    "{% endif %}"),
        "word": ("no ||| yes", "Say it: {{text}} ||| {{word}}"),
        "draw": (None, "{{ options | choice }} {{text}} ||| x"),
        "sum": (None, "{{text}} {{ (label + 1) }} ||| x"),
    }  # fmt: skip
    good = {"text": "t", "label": 1, "word": "yes", "options": ["a"]}
    changes = [{}, {"label": 5}, {"label": -1}, {"label": None}, {"word": ""}, {"word": "maybe"}]
    rows = [{**good, **change} for change in [*changes, {"options": []}]]
    rows += [{key: value for key, value in good.items() if key != "text"}, "{not json"]
    rows += [{**good, "text": "cut \ud83d"}, {**good, "text": "w\0i\0d\0e"}]
    write_templates(tmp_path / "templates", "bad", templates)
    write_rows(tmp_path / "data", "bad", "train", rows)
    (tmp_path / "mix.yaml").write_text("datasets: [bad]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    counts = {reason: facts["count"] for reason, facts in result.manifest["dropped"].items()}
    assert counts == {
        "label out of range of the answer choices": 1,
        "no label": 1,
        "no answer part": 1,
        "empty target": 1,
        "rendering failed": 2,  # an empty list to draw from; None + 1
        "missing field": 4,
        "unreadable row": 4,
        "text with half a character (lone surrogate)": 4,
        "text with a NUL character": 4,
    }
    first = result.manifest["dropped"]["label out of range of the answer choices"]["first"]
    assert first == "bad, 'options', row 1: answer_choices has 2 entries and none at 5"
    first = result.manifest["dropped"]["unreadable row"]["first"]
    assert first.startswith("bad, 'options', row 8: not JSON: Expecting property name")
    noted = result.manifest["noted"]["answer not among the choices (kept)"]
    assert noted == {"count": 1, "first": "bad, 'word', row 5: 'maybe' is not in ['no', 'yes']"}
    assert PromptedExamples(result.folder / "train/bad_word").rows.tolist() == [0, 1, 2, 3, 5, 6]


def test_values_that_the_template_cuts_are_noted(tmp_path):
    """Oracle: by hand, one of two rows is longer than 2048 characters."""
    write_templates(tmp_path / "templates", "long", {"ask": (None, "{{text}} ||| x")})
    write_rows(tmp_path / "data", "long", "train", [{"text": "a b"}, {"text": "so " * 900}])
    (tmp_path / "mix.yaml").write_text("datasets: [long]\n")
    result, _ = prepare(tmp_path, tmp_path / "out")
    reason = "value cut at 2048 characters, as published (kept)"
    assert result.manifest["noted"] == {reason: {"count": 1, "first": "long, 'ask', row 1"}}
    assert result.manifest["splits"]["train"]["long_ask"]["noted"] == {reason: 1}
    examples = PromptedExamples(result.folder / "train/long_ask")
    assert [example.get("cut") for example in examples] == [None, True]


def test_flipped_rules_drop_what_has_no_wrong_answer(tmp_path):
    templates = {
        "two": ("no ||| yes", "{{text}} Ask. ||| {{answer_choices[label]}}"),
        "one": ("{{word}} ||| {{word}}", "{{text}} Ask. ||| {{word}}"),
        "other": ("no ||| yes", "{{text}} Ask. ||| maybe"),
        "silent": ("no ||| yes", "{{text}} ||| {{answer_choices[label]}}"),
        "bare": ("no ||| yes", "{{text}}|||{{answer_choices[label]}}"),
        "none": (None, "{{text}} Ask. ||| yes"),
    }
    write_templates(tmp_path / "templates", "bad", templates)
    write_rows(tmp_path / "data", "bad", "train", [{"text": "t", "label": 0, "word": "yes"}])
    (tmp_path / "mix.yaml").write_text(
        "datasets: [bad]\nneeds_choices: true\nmetric: Accuracy\ncap_of: dataset\ncap: 7\n"
        "fold_whitespace: false\n"
    )
    result, _ = prepare(tmp_path, tmp_path / "out")
    counts = {reason: facts["count"] for reason, facts in result.manifest["dropped"].items()}
    assert counts == {
        "a single answer choice": 1,
        "answer not among the choices": 1,
        "no instruction to guess": 1,
    }
    assert set(result.manifest["splits"]["train"]) == {"bad_two", "bad_silent"}
    assert result.manifest["left_out"] == {"bad_none": "no answer choices"}
    assert result.manifest["cap_of"] == "dataset"
    assert {facts["cap"] for facts in result.manifest["splits"]["train"].values()} == {7}
