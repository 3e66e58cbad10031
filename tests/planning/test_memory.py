"""The formula of memory, against weights that are counted and peaks that are measured."""

import json
import sys

import pytest

from metro.models.registry import registered_models
from metro.planning.memory import Batch, Training, stored, training
from metro.planning.sizes import Sizes, total
from metro.utils.messages import UserError
from tests.finetuning.prepared import write_prepared, write_t5
from tests.processes import run_python

CONFIGS = [
    dict(kind="T5", feed_forward_proj="gated-gelu"),
    dict(kind="T5", feed_forward_proj="relu", num_decoder_layers=3),
    dict(kind="MetroT5", num_decoder_layers=3, max_positions=50),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_counted_as_the_model_has_them(config):
    import transformers

    import metro

    config = {"MetroT5": metro.MetroT5Config, "T5": transformers.T5Config}[config["kind"]](
        d_model=48, d_kv=8, d_ff=100, num_heads=4, num_layers=2, vocab_size=99,
        **{name: value for name, value in config.items() if name != "kind"},
    )  # fmt: skip
    metro.register()
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    sizes = Sizes.of(config.to_dict(), "it")
    assert sizes.weights == sum(weight.numel() for weight in model.parameters())
    linear = [
        m for n, m in model.named_modules() if type(m).__name__ == "Linear" and n != "lm_head"
    ]
    adapters = 3 * sum(m.in_features + m.out_features for m in linear)
    assert total(sizes.adapters(3)) == adapters
    states = 4 * (adapters // 3 + 6 * len(linear))  # rows + columns of two adapters each
    assert training(sizes, Batch(1, 9, 9), Training(lora_r=3)).optimizer == states


def test_weights_of_pretraining_are_counted_as_the_model_has_them():
    from metro.pretraining.building import build_model
    from metro.pretraining.settings import PretrainingSettings

    settings = PretrainingSettings.combine("metro_t5_tiny", {"data": "d", "output_dir": "o"})
    model = build_model(settings := settings.resolved(), 1000)
    found = Sizes.of(model.config.to_dict(), "it", settings.generator_layers).weights
    assert found == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", registered_models())
def test_registered_models_have_as_many_weights_as_they_say(name):
    assert Sizes.find(name).weights == registered_models()[name].parameters


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_rounded_weights_take_what_bitsandbytes_takes(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    import metro

    folder = write_t5(tmp_path, d_model=256, d_ff=1024, num_heads=16, num_layers=2)
    found = metro.load(folder, load_in=bits).model.get_memory_footprint()
    assert stored(Sizes.find(str(folder)), 4, bits) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("half", [True, False])
def test_sharded_training_has_whole_blocks_and_their_gradients_for_a_moment(half):
    """T5 11B by hand: a decoder layer has 2 x 4 projections and 3 matrices of the feed-forward.

    Two layers and both embeddings are gathered, one layer's and the embeddings' gradients are
    there in the precision of the training, and in float32 where they are averaged.
    """
    sizes = Sizes.find("t0_11b")
    block, root = 8 * 4096 * 64 * 64 + 3 * 4096 * 10240, 2 * 32128 * 4096
    computed = 2 if half else 4
    gathered = computed * (2 * block + root) + (computed + 4) * (block + root)
    alone, eight = (
        training(sizes, Batch(32, 512, 128), Training(half=half, shards=n)) for n in (1, 8)
    )
    copies = 2 * sizes.weights if half else 0
    room = alone.gradients - eight.gradients  # which activations leave to gradients
    more = eight.activations - alone.activations
    assert more == pytest.approx(gathered + room - copies, rel=1e-6)


def test_other_kinds_of_models_and_files_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart"}))
    with pytest.raises(UserError, match="is a model of type bart; metro plan knows T5"):
        Sizes.find(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    with pytest.raises(UserError, match=r"config.json of .* has no d_kv"):
        Sizes.find(str(tmp_path))


PEAK = """
import json, sys
import metro

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line) * 1024

tiny, settings = map(json.loads, sys.argv[1:])
metro.finetune(progress=False, **tiny)  # all that is imported, and of the process itself
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
metro.finetune(progress=False, **settings)
print(status("VmHWM") - before)
"""
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Of glibc: what is freed is given back, so that resident memory is what tensors take."""
SMALL, MIDDLE, LARGE = (
    dict(d_model=width, d_kv=64, d_ff=4 * width, num_heads=width // 64, num_layers=layers,
         feed_forward_proj="gated-gelu")
    for width, layers in ((256, 6), (512, 8), (768, 12))
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model", "options", "how"),
    [
        (SMALL, {}, {}),
        (MIDDLE, {}, {}),
        (LARGE, {"batch_size": 4}, {}),
        (SMALL, {"optimizer": "adamw", "objective": "flipped"}, {"optimizer": "adamw"}),
        (SMALL, {"gradient_checkpointing": True}, {"checkpointing": True}),
        (SMALL, {"lora": True}, {"lora_r": 16}),
        (SMALL, {"gradient_accumulation_steps": 2}, {"accumulates": True}),
    ],
    ids=["16 M", "80 M", "261 M", "flipped, adamw", "checkpointing", "lora", "accumulation"],
)
def test_the_peak_of_a_finetuning_process_is_that_of_the_formula(tmp_path, model, options, how):
    """Resident memory beyond that of a process that has trained a tiny model; within 15 %."""
    folder = write_t5(tmp_path / "model", vocab_size=8192, **model)

    def lengthen(example):
        words = " ".join(["match team goal"] * 60)
        choices = [words, words.replace("team", "song")]
        answers = {"target": words, "answer_choices": choices, "label": 0}
        shorter = " ".join(["match team goal"] * 20)  # so that the label is not cut away
        texts = {"input": words, "flipped_input": shorter, "instruction": words}
        return {**example, **texts, **answers}

    data = write_prepared(tmp_path / "data", 40, change=lengthen)
    settings = dict(model=str(folder), data=str(data), output_dir=str(tmp_path / "out"))
    settings |= dict(max_input_length=160, max_target_length=48, batch_size=8, max_steps=2)
    settings |= dict(save_steps=0, report_to="none", precision="fp32", use_cpu=True)
    settings |= options
    tiny = dict(model=str(write_t5(tmp_path / "tiny")), output_dir=str(tmp_path / "of_tiny"))
    done = run_python(
        "-c", PEAK, *map(json.dumps, (settings | tiny, settings)), env=AT_ONCE, timeout=1200
    )
    copies = 2 if settings.get("objective") == "flipped" else 1
    batch = Batch(copies * settings["batch_size"], 160, 48)
    expected = training(Sizes.find(str(folder)), batch, Training(half=False, **how), chunk=2**24)
    assert expected.total == pytest.approx(float(done.stdout), rel=0.15), expected
