"""Training gives the memory of freed tensors back."""

import json

import pytest

from tests.training.freed import GIVEN_BACK, given_back, of_glibc
from tests.training.tiny import TINY

pytest.importorskip("accelerate", reason="accelerate is not installed (make install)")
pytestmark = of_glibc


@pytest.mark.parametrize("function", ["pretrain", "finetune"])
def test_training_gives_the_memory_of_large_tensors_back(
    function, pretraining_data, t5_folder, prepared, tmp_path
):
    """Oracle: what the system says that the process has."""
    options = {
        "pretrain": {**TINY, "data": pretraining_data, "max_update": 1},
        "finetune": {"model": t5_folder, "data": prepared, "max_steps": 1, "use_cpu": True},
    }[function] | {"output_dir": tmp_path / "out"}
    code = f"import json, metro, sys; metro.{function}(progress=False, **json.loads(sys.argv[1]))"
    assert given_back(code + GIVEN_BACK, json.dumps(options, default=str)) > 150


@pytest.mark.parametrize(
    "chosen, least, most", [({}, 150, 170), ({"MALLOC_MMAP_THRESHOLD_": str(2**25)}, 0, 20)]
)
def test_the_size_that_the_user_chose_stays(chosen, least, most):
    """Oracle: as above."""
    call = "from metro.training.memory import return_large_tensors; return_large_tensors()"
    assert least <= given_back(call + GIVEN_BACK, env=chosen) <= most
    assert given_back(GIVEN_BACK) <= 20  # glibc by itself
