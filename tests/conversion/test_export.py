"""An exported folder stands alone, and is complete or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AddedToken

import metro
import metro.modeling
import metro.utils.files
from metro.conversion.export import EXPORTED_CODE, export_model
from metro.conversion.fairseq_to_hf import to_hf

ALONE = """
import socket, sys
from importlib.abc import MetaPathFinder

class NoMetro(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "metro":
            raise ModuleNotFoundError("metro is not installed here", name="metro")

sys.meta_path.insert(0, NoMetro())

def refuse(*args, **kwargs):
    raise OSError("the network is refused")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
)

folder, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
encoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "MetroT5Config"
classifier = AutoModelForSequenceClassification.from_pretrained(
    folder, trust_remote_code=True, num_labels=3
)
inputs = tokenizer(text.split("|"), padding=True, return_tensors="pt")
labels = tokenizer(["yes , it is"] * len(inputs["input_ids"]), return_tensors="pt")["input_ids"]
with torch.no_grad():
    output = model(**inputs, labels=labels)
    states = encoder(**inputs).last_hidden_state
    assert classifier(**inputs).logits.shape == (len(inputs["input_ids"]), 3)
sequences = model.generate(**inputs, max_new_tokens=20, do_sample=False)
try:
    import metro
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("metro was there")
assert not any(name == "metro" or name.startswith("metro.") for name in sys.modules)
torch.save(
    {
        "input_ids": inputs["input_ids"], "logits": output.logits, "loss": output.loss,
        "states": states, "sequences": sequences,
        "decoded": tokenizer.batch_decode(sequences, skip_special_tokens=True),
    },
    out,
)
"""


@torch.no_grad()
@pytest.mark.client("from_pretrained", "exports without METRO (`trust_remote_code`)")
def test_an_export_works_where_neither_metro_nor_a_network_is(exported, tmp_path):
    """Oracle: the same folder in this process, with the classes of ``metro.modeling``."""
    folder = exported("t5_prompt_tiny_f")
    texts = ["Is this good? Review: I loved it!", "The lobster is blue."]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(folder), "|".join(texts), str(tmp_path / "out.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "out.pt", weights_only=True)

    model, tokenizer = metro.load(folder)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(alone["input_ids"], inputs["input_ids"])
    labels = tokenizer(["yes , it is"] * 2, return_tensors="pt")["input_ids"]
    output = model(**inputs, labels=labels)
    assert torch.equal(alone["logits"], output.logits) and torch.equal(alone["loss"], output.loss)
    sequences = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(alone["sequences"], sequences)
    assert alone["decoded"] == tokenizer.batch_decode(sequences, skip_special_tokens=True)
    assert torch.equal(alone["states"], model.encoder(**inputs).last_hidden_state)


def test_code_is_copied_byte_for_byte_and_completely(exported):
    """Oracle: ``metro/modeling``, all of it but the package marker."""
    source, folder = Path(metro.modeling.__file__).parent, exported("metro_tiny_a")
    files = {path.name for path in source.glob("*.py")} - {"__init__.py"}
    assert files == set(EXPORTED_CODE) == {path.name for path in folder.glob("*.py")}
    for name in files:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    maps = {
        **json.loads((folder / "config.json").read_text())["auto_map"],
        "AutoTokenizer": json.loads((folder / "tokenizer_config.json").read_text())["auto_map"][
            "AutoTokenizer"
        ][0],
    }
    assert set(maps) >= {"AutoConfig", "AutoModelForSeq2SeqLM", "AutoModel", "AutoTokenizer"}
    for reference in maps.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()


def test_a_model_in_memory_is_exported_with_its_changes(exported, tmp_path):
    """Oracle: the weights and settings that were changed after loading."""
    model, tokenizer = metro.load(exported("t5_prompt_tiny_f"))
    with torch.no_grad():
        model.shared.weight.add_(1)
    model.config.dropout_rate = 0.25
    added = AddedToken("zebra", lstrip=True, single_word=True, normalized=False)
    tokenizer.add_tokens([added])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    export_model(model, tokenizer, tmp_path / "out", summary="A test.", training={"updates": 7})
    again, their_tokenizer = metro.load(tmp_path / "out")
    assert their_tokenizer.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    assert again.config.dropout_rate == 0.25
    card = (tmp_path / "out/README.md").read_text()
    assert "A test." in card and "| updates | 7 |" in card
    with pytest.raises(ValueError, match="exists"):
        export_model(model, tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="Linear is not METRO-T5"):
        export_model(torch.nn.Linear(1, 1), tokenizer, tmp_path / "other")


# Complete, or not there.


def convert(golden, out, name="t5_tiny_c", **options):
    checkpoint = golden / f"checkpoints/{name}.pt"
    return to_hf(checkpoint, out, vocab=golden / "tiny_vocab", **options)


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(golden, tmp_path, monkeypatch):
    """Oracle: a disk that is full when the weights are written."""
    convert(golden, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metro.conversion.export.save_file", full)
    for out, overwrite in (("new", False), ("old", True)):
        with pytest.raises(OSError, match="No space"):
            convert(golden, tmp_path / out, "t5_prompt_tiny_f", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


KILLER = """
import os, signal, sys, time
import metro.utils.files as atomic_output
from metro.conversion.fairseq_to_hf import to_hf

checkpoint, vocab = sys.argv[1:]
make_folder = atomic_output.tempfile.mkdtemp
for line in sys.stdin:  # forked from here, where no other thread is: seconds faster than a start
    out, delay, overwrite = line.split()
    started, tell = os.pipe()
    child = os.fork()
    if child == 0:
        def make_and_tell(*args, **kwargs):
            folder = make_folder(*args, **kwargs)
            os.write(tell, b"x")
            return folder
        atomic_output.tempfile.mkdtemp = make_and_tell
        try:
            to_hf(checkpoint, out, vocab=vocab, overwrite=overwrite == "True")
        finally:
            os._exit(0)
    os.close(tell)
    os.read(started, 1)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]), flush=True)
    os.close(started)
"""


@pytest.fixture
def kill_while_converting(golden):
    """Convert in another process and SIGKILL it ``delay`` seconds after it began to write.

    Returns whether it was still at it.
    """
    checkpoint = golden / "checkpoints/t5_prompt_tiny_f.pt"
    arguments = [str(checkpoint), str(golden / "tiny_vocab")]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLER, *arguments],
        cwd=Path(metro.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )

    def kill(out: Path, delay: float, overwrite: bool) -> bool:
        process.stdin.write(f"{out} {delay} {overwrite}\n")
        return process.stdout.readline().strip() == "True"

    yield kill
    process.stdin.close()
    process.wait(timeout=240)


def test_a_killed_export_leaves_nothing_that_looks_complete(
    golden, tmp_path, kill_while_converting
):
    """Oracle: the files of an export that was not killed, and of the one before."""
    convert(golden, tmp_path / "done", "t5_prompt_tiny_f")
    new = load_file(tmp_path / "done/model.safetensors")
    convert(golden, tmp_path / "before", "t5_tiny_c")
    old = load_file(tmp_path / "before/model.safetensors")
    complete = {path.name for path in (tmp_path / "done").iterdir()}
    convert(golden, tmp_path / "replaced", "t5_tiny_c")
    num_killed = 0
    for step in range(6):
        delay = step * 0.004
        fresh = tmp_path / f"fresh{step}"
        num_killed += kill_while_converting(fresh, delay, overwrite=False)
        num_killed += kill_while_converting(tmp_path / "replaced", delay, overwrite=True)
        if fresh.exists():  # moved into place before the kill
            assert {path.name for path in fresh.iterdir()} == complete
            tensors = load_file(fresh / "model.safetensors")
            assert all(torch.equal(tensor, new[name]) for name, tensor in tensors.items())
        assert {path.name for path in (tmp_path / "replaced").iterdir()} == complete
        tensors = load_file(tmp_path / "replaced/model.safetensors")
        key = "encoder.block.0.layer.0.SelfAttention.q.weight"
        assert any(torch.equal(tensors[key], source[key]) for source in (old, new))
    assert num_killed >= 4
    hidden = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert all(".incomplete-" in p.name or p.name.endswith(".lock") for p in hidden)

    # The next export for the same places removes what the killed ones have left.
    convert(golden, tmp_path / "replaced", "t5_prompt_tiny_f", overwrite=True)
    for step in range(6):
        convert(golden, tmp_path / f"fresh{step}", "t5_prompt_tiny_f", overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_incomplete_folder_has_no_config_until_the_end(golden, tmp_path, monkeypatch):
    """Oracle: what lies in the hidden folder when the model card, the last but one, is written."""
    seen = []
    real = metro.utils.files.write_text

    def look(path, text):
        seen.extend(other.name for other in path.parent.iterdir())
        real(path, text)

    monkeypatch.setattr("metro.conversion.export.write_text", look)
    convert(golden, tmp_path / "out")
    assert "model.safetensors" in seen and "config.json" not in seen
    assert (tmp_path / "out/config.json").exists()
