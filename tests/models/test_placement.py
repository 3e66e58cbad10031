"""Large models: weights over devices and on disk, in few bits, and the memory of loading them.

Oracle, unless a test says otherwise: the same model in the memory of one device.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import metro
from metro.cli.main import load_command
from metro.evaluation.scoring.pair_scoring import Pair, PairScorer
from metro.models.placement import PlacementSettings, own_gpus, own_share, placement
from metro.utils.identity import weights_identity
from metro.utils.messages import UserError
from tests.finetuning.prepared import write_t5

PAIRS = [Pair((5, 6, 7), (8, 9, 2)), Pair((5, 6, 7), (9, 2)), Pair((5, 6), (10, 11, 2))]
TEXT = "it was good"


@pytest.fixture(scope="module", params=["METRO", "T5"])
def folder(request, exported, tmp_path_factory):
    if request.param == "METRO":
        return exported("t5_prompt_tiny_f")
    return write_t5(tmp_path_factory.mktemp("t5") / "model", d_model=64, num_layers=4, num_heads=4)


@pytest.mark.parametrize("on_cpu", [0, 0.5, 2])
@pytest.mark.client("accelerate", "`metro.load` over CPU and disk: scores, answers, identity")
def test_weights_on_disk_give_the_numbers_of_those_in_memory(folder, on_cpu):
    pytest.importorskip("accelerate")
    whole = metro.load(folder)
    size = sum(weight.nbytes for weight in whole.model.parameters())
    limits = {"cpu": int(on_cpu * size)}
    parted = metro.load(folder, device_map="auto", max_memory=limits)
    on_disk = [weight.is_meta for weight in parted.model.parameters()]
    assert any(on_disk) == (on_cpu < 1) and all(on_disk) == (on_cpu == 0)
    assert weights_identity(parted.model) == weights_identity(whole.model)
    found, expected = (PairScorer(each.model).score(PAIRS) for each in (parted, whole))
    assert found == pytest.approx(expected, abs=1e-5)
    answers = [metro.generate(each, [TEXT], max_new_tokens=5) for each in (parted, whole)]
    assert answers[0] == answers[1]
    probabilities = [metro.Ranker(m, ["good", "bad"])(TEXT).probabilities for m in (parted, whole)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.client("bitsandbytes", "weights in 8 and 4 bits, QLoRA")
def test_weights_in_few_bits_score_nearly_alike(folder, bits):
    """Rounding to 8 bits moves a weight by 0.4 % of a row's largest, to 4 bits by less than 8 %."""
    pytest.importorskip("bitsandbytes")
    whole, rounded = metro.load(folder), metro.load(folder, load_in=bits)
    linear = [m for m in rounded.model.modules() if type(m).__name__.startswith("Linear")]
    assert {"Linear8bitLt", "Linear4bit"} & {type(module).__name__ for module in linear}
    assert rounded.model.get_memory_footprint() < 0.8 * whole.model.get_memory_footprint()
    assert weights_identity(rounded.model) != weights_identity(whole.model)
    found, expected = (PairScorer(each.model).score(PAIRS) for each in (rounded, whole))
    assert found == pytest.approx(expected, rel=0.02 if bits == "8bit" else 0.2)
    assert found != pytest.approx(expected, rel=1e-6)


def test_what_is_loaded_whole_is_refused_with_the_remedy(golden, exported, tmp_path):
    peft = pytest.importorskip("peft")
    checkpoint = golden / "checkpoints/t5_prompt_tiny_f.pt"
    with pytest.raises(UserError, match=r"convert it first, metro convert to-hf .*\.pt --out"):
        metro.load(checkpoint, device_map="auto")
    model = metro.load(exported("t5_prompt_tiny_f")).model
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM"))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="merge it first, metro convert to-hf"):
        metro.load(tmp_path, device_map="auto", max_memory={"cpu": 0})


ASKED = {
    "rank": [TEXT, "--options", "good", "bad"],
    "generate": [TEXT, "--max-new-tokens", "5"],
    "flip": ["--input", TEXT, "--options", "good", "bad", "--max-new-tokens", "4"],
    "evaluate": ["--data", "rows.csv", "--template", "{{text}} ||| {{label}}"],
}


@pytest.mark.parametrize("command", ASKED)
def test_every_command_that_loads_takes_a_device_map(
    t5_folder, command, tmp_path, monkeypatch, capsys
):
    """Without a GPU the whole model is on the CPU: the output is that without the option."""
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text,label\n" + "it was good,good\nit was bad,bad\n" * 3)
    outputs = []
    for options in ([], ["--device-map", "auto"]):
        more = ["--overwrite"] if command == "evaluate" else []
        arguments = [str(t5_folder), *ASKED[command], *more, *options]
        load_command(command).main(arguments, standalone_mode=False)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


def test_processes_of_a_machine_share_its_gpus(monkeypatch):
    shares = []
    for local in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        shares.append([*own_gpus(8)])
    assert shares == [[0, 1], [2, 3], [4, 5]]
    assert [*own_gpus(0)] == []
    with pytest.raises(UserError, match="3 processes share 2 GPUs"):
        own_gpus(2)


def test_a_process_asks_its_own_gpus_alone(monkeypatch):
    """A question to another's would open a context of some 500 MB there."""
    pytest.importorskip("psutil")
    asked = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: (asked.append(i), (100 + i, 200))[1])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    share = own_share()
    assert asked == [2, 3] and {i: share[i] for i in asked} == {2: 102, 3: 103}
    assert len(share) == 3


def test_options_that_cannot_be_met_are_refused(monkeypatch):
    both = PlacementSettings(device="cpu", device_map="auto").placed("cpu")
    with pytest.raises(UserError, match="device cpu and device_map auto both place the model"):
        placement(**both, dtype=None)
    with pytest.raises(UserError, match="load_in is '2bit'; use 8bit or 4bit"):
        placement(None, None, "2bit", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"load_in 4bit needs the package bitsandbytes: pip install"
    ):
        placement(None, None, "4bit", None)
    with pytest.raises(UserError, match=r"device_map auto needs the package accelerate"):
        placement(None, "auto", None, None)


PEAK = """
import sys
import accelerate, transformers, metro
from transformers import T5ForConditionalGeneration
from metro.models.loading import load
from metro.utils.identity import weights_identity

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line) * 1024

before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
model = load(sys.argv[1]).model
weights_identity(model)  # reads every weight
print((status("VmHWM") - before) / float(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_shards_takes_at_most_a_fifth_more_memory_than_they_hold(tmp_path):
    """Peak of the resident memory of a fresh process, all weights read, over the files' size."""
    write_t5(tmp_path, d_model=512, d_ff=4096, num_layers=6, max_shard_size="40MB")
    files = sorted(tmp_path.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    assert len(files) >= 4 and size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(size)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.2
