"""The figure: a point per prompt, per task, with median and published value.

Oracles: what the drawn elements say of themselves gives their places; distances by hand.
"""

import re
from itertools import combinations
from math import hypot
from xml.etree import ElementTree

import pytest

from metro.evaluation.report.comparison import compare
from metro.evaluation.report.figure import make_scale, standalone
from metro.evaluation.report.svg_marks import spread
from metro.evaluation.runs.run_folder import read_run
from tests.evaluation.run_folders import write_run

SVG = "{http://www.w3.org/2000/svg}"


def elements(svg: str, name: str) -> list:
    """The drawn elements of a class that say what they are; those of the legend do not."""
    found = ElementTree.fromstring(svg).iter()
    return [e for e in found if e.get("class", "").split(" ")[0] == name and hint(e)]


def hint(element) -> str:
    return element.findtext(f"{SVG}title") or ""


def test_panels_have_a_point_per_prompt_at_its_height(section):
    """Oracle: heights are linear in accuracy: what the points say in their titles gives their place
    from that of two others; median and published value lie on the same scale."""
    svg = standalone(section)
    points = [e for e in elements(svg, "point") if " · prompt" in hint(e) and e.get("cy")]
    assert len(points) == 10
    place = {float(hint(e).split(": ")[1]): float(e.get("cy")) for e in points}
    slope = (place[68.0] - place[50.0]) / 18
    assert slope < 0  # up is better
    for value, y in place.items():
        assert y == pytest.approx(place[50.0] + slope * (value - 50), abs=0.11)
    (median,) = [e for e in elements(svg, "median") if "median 59.00" in hint(e)]
    assert float(median.get("y1")) == pytest.approx(place[50.0] + 9 * slope, abs=0.11)
    (own,) = [e for e in elements(svg, "own") if "61.62" in hint(e)]
    ys = [float(pair.split(",")[1]) for pair in own.get("points").split()]
    assert (min(ys) + max(ys)) / 2 == pytest.approx(place[50.0] + 11.62 * slope, abs=0.11)
    chances = {e.get("y1") for e in elements(svg, "chance")}
    assert [float(y) for y in chances] == pytest.approx([place[50.0]], abs=0.11)


def test_points_do_not_cover_each_other():
    """Oracle: distances, for many equal values and room enough."""
    places = spread({str(i): 100.0 + (i % 3) for i in range(8)}, most=40)
    for (x1, y1), (x2, y2) in combinations(places.values(), 2):
        assert hypot(x1 - x2, y1 - y2) >= 6 - 1e-6
    assert all(abs(x) <= 5 for x, _ in spread({str(i): 1.0 for i in range(30)}, most=5).values())


def test_suites_with_one_prompt_each_are_rows_best_first(tmp_path):
    """Oracle: the order of the accuracies; positions across are linear in accuracy."""
    tasks = {f"subject_{i:02d}": {"p": 0.2 + 0.01 * (i * 7 % 57)} for i in range(57)}
    (section,) = compare([read_run(write_run(tmp_path / "run", tasks, suite="mmlu", chance=0.25))])
    svg = standalone(section)
    values = [float(hint(e).split(": ")[1]) for e in elements(svg, "point") if "·" in hint(e)]
    assert len(values) == 57
    assert values == sorted(values, reverse=True)
    assert make_scale(section) == (20, 80)
    across = {
        float(re.search(r"p: ([\d.]+)", ElementTree.tostring(e, "unicode"))[1]): float(
            e.get("x").rstrip("%")
        )
        for e in ElementTree.fromstring(svg).iter(f"{SVG}svg")
        if e.get("width") == "1"
    }
    assert across[20.0] == 1.5 and across[50.0] == pytest.approx(50.0, abs=0.01)


def test_axis_holds_every_value(tmp_path):
    """Oracle: round ends around 0 and 1 and around a narrow range."""
    wide = read_run(write_run(tmp_path / "wide", {"rte": {"a": 0.0, "b": 1.0}}))
    narrow = read_run(write_run(tmp_path / "narrow", {"rte": {"a": 0.51, "b": 0.52}}))
    assert make_scale(compare([wide])[0]) == (0, 100)
    low, high = make_scale(compare([narrow])[0])
    assert low <= 50 and high >= 52 and high - low >= 20
