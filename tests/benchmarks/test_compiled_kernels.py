"""What compiled kernels take of a GPU. Oracle: Triton's own compiler; no GPU is needed."""

import json
import os

import pytest

from benchmarks.compiled_kernels import ARCHITECTURE, BEFORE, compile_kernel, launch_of
from tests.conftest import ROOT

RESULT = json.loads((ROOT / "benchmarks/results/compiled_kernels.json").read_text("utf-8"))
ROWS = {row["kernel"]: row for row in RESULT["rows"]}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradient"])
def test_the_bias_of_attention_is_not_copied_ahead(kernel, monkeypatch, tmp_path):
    """As many copies with bias as without; the committed row is that of the code."""
    triton = pytest.importorskip("triton", reason="needs the package triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = [f"attention, {kernel}: {flags}" for flags in ("bias dropout", "dropout")]
    found = {name: compile_kernel(launch_of(name), ARCHITECTURE) for name in names}
    with_bias, without = found.values()
    assert with_bias.copies == without.copies > 0
    if triton.__version__ == RESULT["triton"]:
        for name, needs in found.items():
            assert ROWS[name] == {"kernel": name, **needs._asdict()}


def test_committed_rows_have_one_before_them_each():
    before = {row["kernel"]: row for row in RESULT["before"]["rows"]}
    assert list(before) == list(ROWS) == list(BEFORE)
    assert before["attention, forward: bias dropout"]["copies"] == 111
