"""What cannot be read is refused at once: seconds before torch is there."""

import pytest

from metro.models.source import model_source, trained_method
from metro.utils.messages import UserError
from tests.processes import run_python

COMMANDS = """
import sys
from metro.cli.main import load_command

for line in sys.stdin.read().splitlines():
    name, *arguments = line.split()
    try:
        load_command(name)(arguments, standalone_mode=False)
    except (ValueError, OSError) as error:
        print(error)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_wrong_paths_and_names_are_refused_before_torch_is_imported(tmp_path):
    """Oracle: the modules of the process after all of these commands."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("a")
    (tmp_path / "model.pt").write_text("a")
    refused = {
        "generate metro_t0_bse text": "did you mean 'metro_t0_base'",
        "generate empty text": "empty has no config.json",
        "generate empty --input none.txt": "there is no file none.txt to read texts from",
        "generate metro_t0_base text --output taken": "taken exists",
        "generate model.pt text --vocab empty": "empty has no sp.model",
        "convert to-hf none.pt --out out": "there is no file none.pt",
        "convert to-hf empty --out out": "empty has no config.json",
        "convert to-hf model.pt --out taken": "taken exists",
        "convert to-hf model.pt --out out --vocab empty": "empty has no sp.model",
        "convert to-fairseq empty --out out": "empty has no config.json",
        "convert to-fairseq empty --out taken": "taken exists",
    }
    done = run_python("-c", COMMANDS, input="\n".join(refused), cwd=tmp_path)
    *messages, modules = done.stdout.splitlines()
    assert modules == "[]" and done.stderr == ""
    for message, expected in zip(messages, refused.values(), strict=True):
        assert expected in message


@pytest.mark.parametrize(
    "name, source",
    [
        ("metro_t0p_base", "gonglinyuan/metro_t0p_base"),
        ("bigscience/T0_3B", "bigscience/T0_3B"),
        ("somebody/their-model", "somebody/their-model"),
        (__file__, __file__),
    ],
)
def test_a_name_leads_to_the_hub_and_a_path_to_itself(name, source):
    """Oracle: by hand."""
    assert model_source(name) == source


def test_a_folder_says_what_method_it_was_trained_for(tmp_path):
    """Oracle: by hand."""
    assert trained_method("flipped_3b") == "flipped" and trained_method("nowhere") is None
    for content, method in (
        ("{}", None),
        ("[]", None),
        ('{"scoring_method": "channel"}', "channel"),
    ):
        (tmp_path / "generation_config.json").write_text(content)
        assert trained_method(tmp_path) == method
    (tmp_path / "generation_config.json").write_text('{"scoring_method": "guess"}')
    with pytest.raises(UserError, match="scoring_method is 'guess'; use direct, channel, flipped"):
        trained_method(tmp_path)
