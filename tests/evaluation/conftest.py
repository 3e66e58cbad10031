"""What the tests of the report look at."""

import pytest

from metro.evaluation.report.comparison import compare
from metro.evaluation.runs.run_folder import read_run
from tests.evaluation.run_folders import PROMPTS, PUBLISHED, TITLES, write_run


@pytest.fixture
def section(tmp_path):
    """Two runs, the first of a registered model, the second with a partial task."""
    first = write_run(tmp_path / "first", PROMPTS, registered="metro_t0_base")
    second = write_run(
        tmp_path / "second",
        {"rte": {"prompt 0": 0.7}, "cb": dict.fromkeys("abc", 0.5)},
        model="runs/mine/checkpoint_last.pt",
        listed={task: list(prompts) for task, prompts in PROMPTS.items()},
    )
    (section,) = compare([read_run(first), read_run(second)], PUBLISHED, TITLES)
    return section
