"""What ``auto`` may choose. Oracle: by hand."""

import pytest
import torch

from metro.ops import dispatch
from metro.ops.dropout import dropout
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm
from metro.ops.feed_forward import feed_forward
from metro.ops.packed_linear import packed_linear
from metro.ops.relative_position_attention import relative_position_attention


@pytest.mark.parametrize("installed, gpu", [(True, (8, 0)), (True, (7, 5)), (False, (9, 0))])
def test_kernels_are_chosen_on_gpus_they_are_for_and_not_switched_off(monkeypatch, installed, gpu):
    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: installed)
    monkeypatch.setattr(dispatch, "compute_capability", lambda device: gpu)
    serves = installed and gpu >= (8, 0)
    for value, expected in ((None, serves), ("1", serves), ("0", False)):
        monkeypatch.delenv("METRO_TRITON", raising=False)
        if value is not None:
            monkeypatch.setenv("METRO_TRITON", value)
        assert dispatch.has_kernels(torch.device("cuda", 0)) is expected
        assert not dispatch.has_kernels(torch.device("cpu"))


def test_the_compiler_asks_for_kernels_in_one_graph(monkeypatch):
    monkeypatch.delenv("METRO_TRITON", raising=False)

    def step(x):
        return x + (2.0 if dispatch.has_kernels(x.device) else 1.0)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1.0


def test_a_kernel_that_cannot_run_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: True)
    with pytest.raises(ValueError, match="float64.*'reference'"):
        dispatch.check_kernel(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="needs a GPU.*'auto'"):
        dispatch.check_kernel(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.check_kernel(torch.zeros(1))
    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: False)
    with pytest.raises(ValueError, match="package triton is not installed: install it"):
        dispatch.check_kernel(torch.zeros(1))


def test_eager_paths_are_left_to_the_compiler_and_to_autocast():
    x = torch.zeros(1)
    assert dispatch.is_eager_cpu(x) and not dispatch.is_eager_cuda(x)
    assert not dispatch.is_eager_cpu(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not dispatch.is_eager_cpu(x)


X, Y = torch.zeros(1, 1), torch.zeros(1)


@pytest.mark.parametrize(
    ("operation", "arguments", "valid"),
    [
        (dropout, (X, 0.1), "'bytes'"),
        (dropout_add_layer_norm, (X, X, Y, Y), "'triton'"),
        (feed_forward, (X, X, Y, X, Y), "'in_place'"),
        (packed_linear, (X, [X, X], [Y, Y]), "'summed'"),
        (relative_position_attention, (X[None, None],) * 3, "'cached' or 'triton'"),
    ],
)
def test_an_unknown_implementation_is_refused_with_the_valid_ones(operation, arguments, valid):
    with pytest.raises(ValueError, match=f"'fast'.*{valid}"):
        operation(*arguments, impl="fast")
