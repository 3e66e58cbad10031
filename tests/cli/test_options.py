"""Commands built from settings: what is typed, written in YAML or passed in Python is the same.

Oracle: the settings object put together by hand.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from metro.cli.main import COMMANDS, load_command
from metro.cli.options import settings_command
from metro.data.settings import PreparePromptsSettings, PrepareTextSettings
from metro.evaluation.settings import EvaluationSettings, FlipSettings, ReportSettings
from metro.finetuning.settings import FinetuningSettings
from metro.generation.settings import GenerationSettings
from metro.utils.messages import UserError
from metro.utils.settings import Settings, option


@dataclass(kw_only=True)
class CountSettings(Settings):
    """Options of a command that does not exist."""

    model: str = option(help="Model.", positional=True)
    inputs: list[str] = option(help="Files.", flag="--input,-i", many=True)
    unit: str = option("lines", "Unit of the count.", choices=("lines", "tokens"))
    betas: list[float] = option([0.9, 0.99], "Two numbers.", most=1)
    limit: int | None = option(None, "At most so many.", least=1)
    rate: float = option(1e-3, "Rate.")
    cased: bool = option(False, "Keep capitals.", flag="--cased/--uncased")
    save: bool = option(True, "Save it.")
    out: Path | None = option(None, "Folder.")


@pytest.fixture
def call():
    seen = []

    def count(settings: CountSettings, verbose: bool) -> None:
        """Count something."""
        seen.append((settings, verbose))

    command = settings_command(
        count,
        CountSettings,
        example="metro count m",
        extra=[click.Option(["--verbose"], is_flag=True)],
    )

    def run(*arguments: str):
        done = CliRunner().invoke(command, [*map(str, arguments)])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return seen.pop() if seen else done

    return run


def test_the_three_ways_give_the_same_settings(call, tmp_path):
    values = dict(model="m", inputs=["a", "b", "c"], unit="tokens", betas=[0.5, 0.6],
                  limit=3, rate=5e-5, cased=True, save=False, out="x")  # fmt: skip
    expected = CountSettings(**values)
    assert expected.out == Path("x") and expected.rate == 0.00005
    typed, verbose = call(
        *"--unit tokens --betas 0.5 --betas 0.6 --limit 3 --rate 5e-5 --cased --no-save".split(),
        *"--out x --verbose -i a --input b m c".split(),
    )
    assert typed == expected and verbose
    (tmp_path / "c.yaml").write_text(
        "model: m\ninputs: [a, b, c]\nunit: tokens\nbetas: [0.5, 0.6]\nlimit: 3\n"
        "rate: 5e-5\ncased: true\nsave: false\nout: x\n"
    )
    assert call("--config", tmp_path / "c.yaml")[0] == expected
    changed, _ = call("--config", tmp_path / "c.yaml", "--limit", "4", "--uncased", "k")
    assert (changed.limit, changed.cased, changed.model) == (4, False, "k")
    assert CountSettings.of(expected, limit=4).limit == 4 and expected.limit == 3


def test_what_is_not_given_keeps_its_default(call):
    settings, _ = call("m", "--input", "a")
    assert settings == CountSettings(model="m", inputs=["a"])
    assert settings.betas == [0.9, 0.99] and settings.save is True and settings.limit is None
    settings.betas.append(1.0)
    assert CountSettings(model="m", inputs=["a"]).betas == [0.9, 0.99]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unit": "words"}, "unit is 'words'; use one of lines, tokens"),
        ({"limit": 0}, "limit is 0; use 1 or more"),
        ({"limit": "many"}, "limit is 'many'; it must be of type int"),
        ({"rate": "fast"}, "rate is 'fast'; it must be of type float"),
        ({"unit": "5"}, "unit is '5'; use one of lines, tokens"),
        ({"rate": "nan"}, "rate is nan; use a finite number"),
        ({"rate": float("inf")}, "rate is inf; use a finite number"),
        ({"betas": [2, 3]}, "betas is 2.0; use at most 1"),
        ({"betas": ["0.5", "x"]}, "betas is 'x'; it must be of type float"),
    ],
)
def test_a_wrong_value_is_refused_in_the_same_words_in_all_three_ways(
    call, tmp_path, values, message
):
    [(name, value)] = values.items()
    needed = {"model": "m", "inputs": ["a"]}
    flags = value if isinstance(value, list) else [value]
    (tmp_path / "c.yaml").write_text(f"model: m\ninputs: a\n{name}: {value!r}\n")
    for way in (
        lambda: CountSettings(**needed, **values),
        lambda: CountSettings.of(**needed, **values),
        lambda: call("m", "-i", "a", *(x for flag in flags for x in (f"--{name}", flag))),
        lambda: call("--config", tmp_path / "c.yaml"),
    ):
        with pytest.raises(UserError) as refused:
            way()
        assert str(refused.value) == message


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (EvaluationSettings, {"models": "m", "max_source_length": -3}),
        (EvaluationSettings, {"models": "m", "max_target_length": 2}),
        (GenerationSettings, {"length_penalty": float("nan")}),
    ],
)
def test_values_out_of_range_are_refused(settings, values):
    name = list(values)[-1]
    with pytest.raises(UserError, match=f"{name} is .*; use "):
        settings(**values)


def test_missing_and_unknown_options_are_named(call):
    with pytest.raises(UserError, match="missing: MODEL, --input; give them"):
        call()
    with pytest.raises(UserError, match="unknown option 'limt'; did you mean 'limit'"):
        CountSettings.of(model="m", inputs=["a"], limt=3)
    assert "No such option" in call("m", "--limt", "3").output


@pytest.mark.parametrize(
    ("field", "kind"),
    [("limit", "int"), ("rate", "float"), ("betas", "list"), ("unit", "str"), ("out", "Path")],
)
def test_yes_and_no_of_yaml_are_neither_numbers_nor_text(call, tmp_path, field, kind):
    (tmp_path / "c.yaml").write_text(f"model: m\ninputs: a\n{field}: yes\n")
    for way in (
        lambda: CountSettings(model="m", inputs=["a"], **{field: True}),
        lambda: call("--config", tmp_path / "c.yaml"),
    ):
        with pytest.raises(UserError, match=f"{field} is True; it must be of type {kind}"):
            way()


@pytest.mark.parametrize("field", ["unit", "out"])
@pytest.mark.parametrize("value", ["007", "1.10", "12:30", "1_000", "2020-01-01", "5"])
def test_texts_that_yaml_reads_as_numbers_or_dates_are_refused(call, tmp_path, field, value):
    """Oracle: 007 would become 7, and 12:30 the minutes 750; in quotes both are texts."""
    (tmp_path / "c.yaml").write_text(f"model: m\ninputs: a\n{field}: {value}\n")
    with pytest.raises(UserError, match=f"{field} is .*; it must be of type .*, in YAML in quotes"):
        call("--config", tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(f"model: m\ninputs: a\nout: '{value}'\n")
    assert str(call("--config", tmp_path / "c.yaml")[0].out) == value


@pytest.mark.parametrize("inputs", ["input", "inputs"])
def test_yaml_and_python_take_a_flag_or_a_field_as_the_name(call, tmp_path, inputs):
    """Oracle: by hand; `--input` is the flag of `inputs`."""
    (tmp_path / "c.yaml").write_text(f"model: m\n{inputs}: [a, b]\ncased: true\n")
    expected = CountSettings(model="m", inputs=["a", "b"], cased=True)
    assert call("--config", tmp_path / "c.yaml")[0] == expected
    assert CountSettings.of(model="m", cased=True, **{inputs: ["a", "b"]}) == expected
    with pytest.raises(UserError, match="are one option; give it once"):
        CountSettings.of(model="m", input=["a"], inputs=["b"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prepare-text", PrepareTextSettings),
        ("prepare-prompts", PreparePromptsSettings),
        ("finetune", FinetuningSettings),
        ("generate", GenerationSettings),
        ("evaluate", EvaluationSettings),
        ("report", ReportSettings),
        ("flip", FlipSettings),
    ],
)
def test_every_option_of_a_command_is_a_key_of_its_files_or_named_as_not(name, settings):
    """Oracle: the options as click lists them."""
    params = {param.name: param for param in load_command(name).params}
    alone = params.pop("config").help.replace(",", " ").replace(")", " ").split()
    for param in params.values():
        if isinstance(param, click.Option):
            flag = max(param.opts, key=len)
            key = flag.removeprefix("--")
            if flag in alone:
                with pytest.raises(UserError, match="unknown option"):
                    settings.by_name({key: 1}, "a file")
            else:
                assert settings.by_name({key: 1}, "a file") == {param.name: 1}


def test_help_explains_every_option(call):
    text = " ".join(call("--help").output.split())
    for part in ("Usage: root [OPTIONS] MODEL", "-i, --input TEXT Files. [required]",
                 "--unit [lines|tokens] Unit of the count. [default: lines]",
                 "--betas FLOAT Two numbers. [default: 0.9, 0.99]", "--cased / --uncased",
                 "--save / --no-save", "--config FILE", "Example: metro count m"):  # fmt: skip
        assert part in text, text


def commands(name: str) -> list[click.Command]:
    command = load_command(name)
    return [command, *getattr(command, "commands", {}).values()]


LINES = {"pretrain": 48}
"""Of `--help`, where it has to name the more than seventy options of fairseq's."""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_names_every_option(name, capsys):
    """Oracle: the options of the command itself; `--help-all` has a line for each."""
    for command in commands(name):
        context = command.make_context("metro", [], terminal_width=80, resilient_parsing=True)
        first = full = command.get_help(context)
        assert len(first.splitlines()) <= LINES.get(name, 40)
        if "--help-all" in first:
            with pytest.raises(click.exceptions.Exit):
                command.make_context("metro", ["--help-all"], terminal_width=80)
            full = capsys.readouterr().out
        assert max(map(len, [*first.splitlines(), *full.splitlines()])) <= 80
        for parameter in command.params:
            for flag in parameter.opts if isinstance(parameter, click.Option) else ():
                assert re.search(rf"^ +(--?[\w-]+, )*{flag}\b", full, re.M), flag
            assert parameter.opts[0] in first or isinstance(parameter, click.Argument)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_understands(name):
    """Oracle: click's parser on the words of the example."""
    import shlex

    for command in commands(name):
        example = shlex.split(command.epilog.split("Example:\n")[1])
        if example[0] == "metro":
            words = example[2 if command.name == name else 3 :]
            command.make_context(command.name, words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "holds no options; write lines such as `model: VALUE`"),
        ("a: [", "is not YAML: while parsing"),
        ("model: m\ninputs: {a: 1}\n", "inputs is {'a': 1}; it must be of type list"),
        ("model: m\ninputs: a\ncased: so\n", "cased is 'so'; it must be of type bool"),
        ("model:\ninputs: a\n", "missing: MODEL"),
        ("modle: m\n", "unknown option 'modle'; did you mean 'model'"),
    ],
)
def test_a_wrong_file_of_options_is_refused_by_name_and_key(call, tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as refused:
        call("--config", path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="there is no file nowhere.yaml"):
        call("--config", "nowhere.yaml")
