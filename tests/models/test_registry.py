"""The registry of released checkpoints says what was published, and the cards say the same."""

import re
import shlex

import pytest

from metro.evaluation.tasks.protocol import PROTOCOLS
from metro.models import registry, registry_cards
from metro.models.registry import METHODS, SUITES, registered_model, registered_models
from tests.conftest import ROOT

T0_EVAL = "rte cb anli_r1 anli_r2 anli_r3 wsc winogrande copa story_cloze hellaswag wic".split()
METRO = [f"metro_{data}_{size}" for size in ("base", "basepp", "largepp")
         for data in ("t0", "t0p", "t0pp")]  # fmt: skip


def test_every_released_checkpoint_is_there():
    """Oracle: the papers' lists of released models."""
    models = registered_models()
    assert set(models) == {*METRO, "t0_3b", "t0_11b", "flipped_3b", "flipped_11b"}
    for name in METRO:
        assert models[name].hub_id == f"gonglinyuan/{name}"
        assert (models[name].family, models[name].method) == ("metro", "direct")
    assert models["t0_11b"].hub_id == "bigscience/T0"
    assert models["flipped_3b"].method == "flipped"
    assert len({model.hub_id for model in models.values()}) == len(models)
    for model in models.values():
        assert model.family in PROTOCOLS and model.method in METHODS
        for table in model.published:
            assert set(table) == {"suite", "source", "results"} and table["suite"] in SUITES
            assert all(0 <= accuracy <= 100 for accuracy in table["results"].values())
            assert table["suite"] != "t0" or set(table["results"]) <= set(T0_EVAL)


def test_published_table_equals_the_papers(testdata):
    """Oracle: Table 2 of the METRO-T0 paper as Markdown, its printed averages included."""
    titles = {registered_models()[name].title: name for name in METRO}
    assert "METRO-T0+-Large++" in titles
    titles |= {"T0-3B": "t0_3b", "T0-11B": "t0_11b"}
    text = (testdata / "published_results.md").read_text(encoding="utf-8")
    section = text.split("## 4. Results")[1].split("### 4.1")[0]
    seen = set()
    for line in section.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if cells[0] not in titles:
            continue
        *values, average = (float(number) for number in re.findall(r"[\d.]+", " ".join(cells[1:])))
        model = registered_model(titles[cells[0]])
        (table,) = [t for t in model.published if t["source"] == "METRO-T0 paper, Table 2"]
        assert [table["results"][task] for task in T0_EVAL] == values, cells[0]
        assert sum(values) / 11 == pytest.approx(average, abs=0.011), cells[0]
        seen.add(model.name)
    assert seen == {*METRO, "t0_3b", "t0_11b"}


def test_cards_of_base_differ_from_the_table_and_those_of_plusplus_do_not():
    """Oracle: what the released numbers are known to do, 0.01 being the table's rounding."""
    for name in METRO:
        card, paper = (table["results"] for table in registered_model(name).published)
        differences = [abs(card[task] - paper[task]) for task in card]
        assert len(differences) >= 9
        assert (max(differences) < 0.011) is name.endswith("pp"), name


def test_first_source_is_the_one_to_compare_with():
    """Oracle: the README of the METRO-T0 repository."""
    first, *others = registered_model("metro_t0_base").published
    assert first["suite"] == "t0"
    assert first["results"]["rte"] == 61.62 and first["results"]["wic"] == 50.42
    assert "mmlu" not in [table["suite"] for table in others]


@pytest.mark.parametrize("name", METRO)
def test_parameters_are_counted_on_the_architecture(name):
    """Oracle: a model of these sizes without storage."""
    import torch

    from metro import MetroT5Config, MetroT5ForConditionalGeneration

    sizes = {"vocab_size": 33280 if name.endswith("base") else 64512, "max_positions": 1024}
    if "large" in name:
        sizes |= {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_layers": 24}
    with torch.device("meta"):
        model = MetroT5ForConditionalGeneration(MetroT5Config(**sizes))
    assert sum(weight.numel() for weight in model.parameters()) == (
        registered_model(name).parameters
    )


def test_every_entry_has_a_card_that_agrees():
    """Oracle: the registry; a card is what it says, written out."""
    cards = {path.stem: path for path in (ROOT / "checkpoints").glob("*.md")}
    assert set(cards) == set(registered_models())
    for name, model in registered_models().items():
        text = cards[name].read_text(encoding="utf-8")
        assert text == registry_cards.write_card(model), (
            "run: metro models --write-cards checkpoints"
        )
        for fact in (model.hub_id, model.vocabulary, model.pretraining, model.finetuning):
            assert fact in text
        for table in model.published:
            assert table["source"] in text
            for accuracy in table["results"].values():
                assert f" {accuracy:.2f} |" in text


@pytest.mark.parametrize("name", ["metro_t0_base", "t0_11b", "flipped_3b"])
def test_the_commands_of_a_card_are_commands(name):
    """Oracle: the parsers of the command line, which do not run them."""
    from metro.cli.main import load_command

    text = registry_cards.write_card(registered_model(name))
    commands = text.split("```sh\n")[1].split("```")[0].replace("\\\n", " ").splitlines()
    assert len(commands) >= 2
    for line in commands:
        metro, subcommand, *arguments = shlex.split(line)
        assert metro == "metro"
        context = load_command(subcommand).make_context(subcommand, arguments)
        assert name in str(context.params)


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("metro_t0_bse", "metro_t0_base"),
        ("METRO-T0++-Large++", "metro_t0pp_largepp"),
        ("gonglinyuan/metro-t0p-base", "metro_t0p_base"),
        ("flipped-3B", "flipped_3b"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(asked, expected):
    with pytest.raises(ValueError, match=f"{re.escape(asked)}.*did you mean '{expected}'"):
        registered_model(asked)
    assert "did you mean" not in registry.suggest("t5-small-of-mine")


def test_hub_id_is_as_good_as_the_name():
    assert registered_model("bigscience/T0").name == "t0_11b"
    assert registry.find_registered("someone/else") is None
