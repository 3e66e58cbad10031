"""`metro models` lists the registry; oracle: the registry."""

import json

import pytest

from metro.cli.main import load_command
from metro.models.registry import registered_models
from metro.utils.messages import UserError


@pytest.fixture
def models(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> str:
        load_command("models")(arguments, standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_list_has_a_line_per_model_on_a_narrow_terminal(models):
    lines = models().splitlines()
    for model in registered_models().values():
        (line,) = [line for line in lines if line.startswith(f"{model.name} ")]
        assert model.hub_id in line and len(line) <= 80
    (flipped,) = [line for line in lines if line.startswith("flipped_3b")]
    assert flipped.split()[1:5] == ["2.85", "B", "FLIPPED", "58.03"]  # the mean that is printed


def test_one_model_is_shown_with_every_number(models):
    shown = models("metro_t0p_base")
    model = registered_models()["metro_t0p_base"]
    assert model.hub_id in shown and "225,618,432" in shown
    for table in model.published:
        for accuracy in table["results"].values():
            assert f" {accuracy:.2f}" in shown
    assert models("gonglinyuan/metro_t0p_base") == shown


def test_json_is_the_registry(models):
    everything = json.loads(models("--json"))
    assert [entry["name"] for entry in everything] == list(registered_models())
    assert json.loads(models("t0_3b", "--json")) in everything
    metro_t0p = json.loads(models("metro_t0p_base", "--json"))
    assert metro_t0p["hub_id"] == "gonglinyuan/metro_t0p_base"
    assert metro_t0p["parameters"] == 225_618_432


def test_cards_are_written_for_every_model(models, tmp_path):
    models("--write-cards", str(tmp_path))
    assert {path.stem for path in tmp_path.iterdir()} == set(registered_models())
    with pytest.raises(UserError, match="create it first"):
        models("--write-cards", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="leave the name"):
        models("t0_3b", "--write-cards", str(tmp_path))
