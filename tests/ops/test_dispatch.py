"""What ``auto`` may choose. Oracle: by hand."""

import pytest
import torch

from metro.ops import dispatch
from metro.ops.dropout import dropout
from metro.ops.dropout_add_layer_norm import dropout_add_layer_norm
from metro.ops.feed_forward import feed_forward
from metro.ops.linear import packed_linear
from metro.ops.relative_position_attention import relative_position_attention

BF16, GPU = torch.bfloat16, torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("setting", "given", "expected"),
    [
        (None, {}, True),
        (None, {"is_trusted": False}, False),
        (None, {"dtype": torch.float16}, False),  # not measured
        (None, {"dtype": torch.float32}, False),
        (None, {"flags": ("mask",)}, False),  # measured, slower
        (None, {"gpu": (8, 0)}, False),  # measured on another generation
        (None, {"gpu": (9, 2)}, True),
        (None, {"device": torch.device("cpu")}, False),
        ("0", {}, False),
        ("1", {"gpu": (8, 0), "is_trusted": False, "dtype": torch.float32}, True),
        ("1", {"gpu": (7, 5)}, False),
        ("1", {"is_installed": False}, False),
        ("1", {"dtype": torch.float64}, False),
    ],
)
def test_kernels_are_chosen_where_measured_faster_and_trusted(
    monkeypatch, setting, given, expected
):
    """In METRO_TRITON 0 is never, and 1 wherever one can run, measured and checked or not."""
    from metro.ops.kernels import self_check

    given = {
        "is_trusted": True,
        "is_installed": True,
        "gpu": (9, 0),
        "flags": ("mask", "bias"),
    } | given
    gains = {"sm_9x": {"op bfloat16 bias mask": 1.5, "op bfloat16 mask": 0.9}}
    monkeypatch.setattr(dispatch, "measured_gains", lambda: gains)
    monkeypatch.setattr(dispatch, "is_triton_installed", lambda: given["is_installed"])
    monkeypatch.setattr(dispatch, "compute_capability", lambda device: given["gpu"])
    monkeypatch.setattr(self_check, "is_trusted", lambda *case: given["is_trusted"])
    monkeypatch.delenv("METRO_TRITON", raising=False)
    if setting is not None:
        monkeypatch.setenv("METRO_TRITON", setting)
    device, dtype = given.get("device", GPU), given.get("dtype", BF16)
    assert dispatch.takes_kernel("op", device, dtype, 64, *given["flags"]) is expected


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("METRO_TRITON", "off")
    with pytest.raises(ValueError, match="METRO_TRITON is 'off'; use 0"):
        dispatch.takes_kernel("op", GPU, BF16, 64)


def test_the_compiler_asks_for_kernels_in_one_graph(monkeypatch):
    monkeypatch.delenv("METRO_TRITON", raising=False)

    def step(x):
        return x + (2.0 if dispatch.takes_kernel("op", x.device, x.dtype, 64, "bias") else 1.0)

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


def test_eager_paths_are_those_of_the_device_and_the_type():
    x = torch.zeros(1)
    assert dispatch.is_eager_cpu(x) and not dispatch.is_eager_cuda(x)
    assert not dispatch.is_eager_cpu(x.double())
    for dtype, is_ours in ((torch.bfloat16, True), (torch.float16, False)):
        with torch.autocast("cpu", dtype):
            assert dispatch.is_eager_cpu(x) == is_ours


X, Y = torch.zeros(1, 1), torch.zeros(1)


@pytest.mark.parametrize(
    ("operation", "arguments", "valid"),
    [
        (dropout, (X, 0.1), "'bits'"),
        (dropout_add_layer_norm, (X, X, Y, Y), "'triton'"),
        (feed_forward, (X, X, Y, X, Y), "'in_place'"),
        (packed_linear, (X, [X, X], [Y, Y]), "'summed'"),
        (relative_position_attention, (X[None, None],) * 3, "'cached' or 'triton'"),
    ],
)
def test_an_unknown_implementation_is_refused_with_the_valid_ones(operation, arguments, valid):
    with pytest.raises(ValueError, match=f"'fast'.*{valid}"):
        operation(*arguments, impl="fast")
