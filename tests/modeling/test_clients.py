"""METRO-T5 in packages of others that know nothing of it.

Oracle, unless a test says otherwise: the model itself, called in this process.
"""

import threading
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    TextIteratorStreamer,
    pipeline,
)

import metro
from tests.modeling.conftest import IDS, LABELS, MASK, tiny
from tests.processes import run_python

TEXTS = ["The lobster is blue.", "Is it? The sea is cold and the river is wide."]


@pytest.fixture(scope="module")
def folder(exported):
    metro.register()
    return str(exported("t5_prompt_tiny_f"))


@pytest.mark.client("TextIteratorStreamer", "an answer token by token, as one text")
def test_a_streamed_answer_is_the_whole_one(folder):
    model, tokenizer = metro.load(folder)
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    options = {**inputs, "max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == tokenizer.decode(model.generate(**options)[0, 1:])


@torch.no_grad()
@pytest.mark.client("pipeline", "`feature-extraction`, `text-classification`")
def test_pipelines_take_a_folder(folder, tmp_path):
    model, tokenizer = metro.load(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    features = pipeline("feature-extraction", model=folder)(TEXTS, return_tensors=True)
    labels = pipeline("text-classification", model=str(tmp_path), top_k=None)(TEXTS, batch_size=2)
    for text, states, found in zip(TEXTS, features, labels, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        torch.testing.assert_close(states, model.encoder(**inputs).last_hidden_state)
        scores = classifier(**inputs).logits[0].softmax(-1)
        expected = {f"LABEL_{number}": float(score) for number, score in enumerate(scores)}
        assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.client("sentence-transformers", "embeddings of sentences by its encoder")
def test_sentence_transformers_averages_the_encoders_states(folder):
    """Oracle: the mean of the states by hand, each text by itself."""
    package = pytest.importorskip("sentence_transformers")
    sentences = package.SentenceTransformer(folder, device="cpu")
    model, tokenizer = metro.load(folder)
    found = sentences.encode(TEXTS, convert_to_tensor=True)
    for text, embedding in zip(TEXTS, found, strict=True):
        states = model.encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(embedding, states[0].mean(0), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.client("torchao", "weights in 8 bits")
def test_weights_in_eight_bits_answer_nearly_the_same(tmp_path):
    """Oracle: float32; a weight's row has 255 values, from its largest one down."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model = tiny(d_model=64, d_kv=16, d_ff=64)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    small = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config)
    weight = small.encoder.block[0].layer[0].SelfAttention.q.weight
    assert type(weight) is not torch.nn.Parameter and small.lm_head.weight is small.shared.weight
    found, expected = (each(IDS, MASK, labels=LABELS).logits for each in (small, model))
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.client("DeepSpeed", "ZeRO-3: losses, a step of training, answers")
def test_parameters_that_zero_3_parts_are_there_where_they_are_read():
    """Two processes compare with the model in one piece."""
    pytest.importorskip("deepspeed")
    script = Path(__file__).with_name("zero_training.py")
    run = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    run_python(*run, script, env={"DS_ACCELERATOR": "cpu"})
