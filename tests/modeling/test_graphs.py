"""Graphs of METRO-T5 that PyTorch and ONNX record at one length are right at others.

Oracle: the model itself, called without a graph.
"""

import io
import warnings

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from metro.fusion import fuse
from metro.modeling.modeling_metro_t5 import MetroT5EncoderModel
from tests.modeling.conftest import PAD, tiny

FREE = torch.export.Dim.DYNAMIC


class WholeModel(nn.Module):
    """Encoder and decoder; the batch, both lengths free."""

    free = ({0: FREE, 1: FREE}, {0: FREE, 1: FREE}, {0: FREE, 1: FREE})

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, decoder_ids):
        return self.model(ids, mask, decoder_ids, use_cache=False).logits

    def inputs(self, batch: int, source: int, target: int):
        ids = torch.randint(3, 60, (batch, source), generator=torch.Generator().manual_seed(batch))
        ids[-1, 2:] = PAD
        return ids, ids.ne(PAD).long(), ids.flip(1).repeat(1, 3)[:, :target].contiguous()


class WithoutMask(WholeModel):
    free = WholeModel.free[1:]

    def forward(self, ids, decoder_ids):
        return self.model(ids, decoder_input_ids=decoder_ids, use_cache=False).logits

    def inputs(self, *sizes: int):
        return super().inputs(*sizes)[::2]


class EncoderAlone(WholeModel):
    free = WholeModel.free[1:]

    def __init__(self, model):
        super().__init__(MetroT5EncoderModel(model.config).eval())
        self.model.load_state_dict(model.state_dict(), strict=False)

    def forward(self, ids, mask):
        return self.model(ids, mask).last_hidden_state

    def inputs(self, *sizes: int):
        return super().inputs(*sizes)[:2]


class DecoderStep(WholeModel):
    """One step of the decoder; keys and values of both attentions come and go as tensors."""

    free = ({0: FREE, 1: FREE}, {0: FREE, 1: FREE}, {0: FREE}, ({0: FREE, 2: FREE},) * 4)

    def forward(self, states, mask, decoder_ids, *keys_and_values):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer, tensors in enumerate(zip(*[iter(keys_and_values)] * 4, strict=True)):
            cache.self_attention_cache.update(*tensors[:2], layer)
            cache.cross_attention_cache.update(*tensors[2:], layer)
            cache.is_updated[layer] = True
        output = self.model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            past_key_values=cache,
        )
        return output.logits, *self.tensors(cache)

    def tensors(self, cache: EncoderDecoderCache) -> list[torch.Tensor]:
        caches = zip(
            cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True
        )
        return [x for pair in caches for layer in pair for x in (layer.keys, layer.values)]

    def inputs(self, batch: int, source: int, past: int):
        ids, mask, decoder_ids = super().inputs(batch, source, past + 1)
        output = self.model(ids, mask, decoder_ids[:, :-1])
        last = decoder_ids[:, -1:].contiguous()
        return output.encoder_last_hidden_state, mask, last, *self.tensors(output.past_key_values)


def traced(module, inputs):
    return torch.jit.trace(module, inputs)


def exported(module, inputs):
    return torch.export.export(module, inputs, dynamic_shapes=module.free).module()


def run_in_onnxruntime(module, inputs):
    """The exporter that torch recommends."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    program = torch.onnx.export(
        module, inputs, dynamic_shapes=module.free, dynamo=True, verbose=False
    )
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [given.name for given in session.get_inputs()]

    def run(*inputs):
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(output) for output in session.run(None, given))

    return run


onnx = pytest.mark.client("ONNX Runtime", "encoder, decoder, a step with its cache; free lengths")
graphs = pytest.mark.client("torch.export, torch.jit.trace", "free batch and lengths")


@pytest.mark.parametrize(
    "make_graph",
    [
        pytest.param(traced, marks=graphs),
        exported,
        pytest.param(run_in_onnxruntime, marks=[pytest.mark.slow, onnx]),
    ],
)
@pytest.mark.parametrize("part", [WholeModel, WithoutMask, EncoderAlone, DecoderStep])
@torch.no_grad()
def test_a_graph_is_right_for_other_batches_and_lengths(make_graph, part):
    """Longer, shorter, one row, one token."""
    module = part(tiny(num_layers=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracers tell of every size that Python sees
        graph = make_graph(module, module.inputs(2, 5, 3))
    for sizes in ((3, 40, 23), (1, 3, 1), (2, 5, 4)):
        inputs = module.inputs(*sizes)
        found, expected = graph(*inputs), module(*inputs)
        if torch.is_tensor(expected):
            found, expected = (found,) if torch.is_tensor(found) else found, (expected,)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_fused_model_is_traced():
    """Its operations record what PyTorch's tracer knows."""
    module = WholeModel(fuse(tiny(num_layers=1)))
    inputs = module.inputs(2, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = traced(module, inputs)
    torch.testing.assert_close(graph(*inputs), module(*inputs), atol=1e-5, rtol=1e-4)
