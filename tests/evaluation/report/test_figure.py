"""The figure: a point per prompt, per task, with median, interval, chance and published value.

Oracles: what the drawn elements say of themselves gives their places; distances by hand.
"""

import re
from itertools import combinations
from math import hypot
from xml.etree import ElementTree

import pytest

from metro.evaluation.report.comparison import compare
from metro.evaluation.report.figure import drawings, spread, standalone
from metro.evaluation.runs.run_folder import read_run
from tests.evaluation.run_folders import write_run

SVG = "{http://www.w3.org/2000/svg}"


def hinted(svg: str) -> list[tuple[str, ElementTree.Element]]:
    """(what it says under the pointer, group) of everything drawn that says something."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return [(hint, group) for group in groups if (hint := group.findtext(f"{SVG}title"))]


def place(group: ElementTree.Element) -> tuple[float, float]:
    """Of a mark; of a line its middle."""
    use = group.find(f".//{SVG}use")
    if use is not None:
        return float(use.get("x")), float(use.get("y"))
    ends = re.findall(r"([\d.]+) ([\d.]+)", group.find(f"{SVG}path").get("d"))
    xs, ys = ([float(end[axis]) for end in ends] for axis in (0, 1))
    return sum(xs) / len(xs), sum(ys) / len(ys)


def test_a_point_per_prompt_stands_at_its_accuracy(section):
    """Oracle: places are linear in accuracy: what the points say gives their place from that of two
    others; median, published value and chance stand on the same scale."""
    (svg, *_) = drawings(section)
    found = hinted(svg)
    points = {
        float(hint.split(": ")[1]): place(group)[0]
        for hint, group in found
        if hint.startswith("METRO-T0-Base · prompt")
    }
    assert len(points) == 10
    slope = (points[68.0] - points[50.0]) / 18
    assert slope > 0
    for value, x in points.items():
        assert x == pytest.approx(points[50.0] + slope * (value - 50), abs=0.01)
    for text, value in [("Base: median 59.00", 59), ("61.62 (card)", 61.62), ("guessing 50", 50)]:
        (group,) = [group for hint, group in found if text in hint]
        assert place(group)[0] == pytest.approx(points[50.0] + slope * (value - 50), abs=0.01)


def test_an_interval_stands_around_the_mean(tmp_path):
    """Oracle: its ends in the summary, on the scale of the points."""
    right = [number % 5 > 0 for number in range(100)]
    wrong = [number % 5 == 0 for number in range(100)]
    run = read_run(write_run(tmp_path / "run", {"rte": {"a": right, "b": wrong, "c": right}}))
    (section,) = compare([run])
    found = hinted(drawings(section)[0])
    xs = {hint.split(" · ")[1]: place(group)[0] for hint, group in found if " · " in hint}
    slope = (xs["a: 80.00"] - xs["b: 20.00"]) / 0.6
    (group,) = [group for hint, group in found if "95 % interval" in hint]
    low, high = section.runs[0].summary.tasks["rte"].interval
    middle = xs["b: 20.00"] + slope * ((low + high) / 2 - 0.2)
    assert place(group)[0] == pytest.approx(middle, abs=0.01)


def test_points_do_not_cover_each_other():
    """Oracle: distances, for equal values and neighbours with room enough."""
    places = [100.0 + 6 * (number // 3) for number in range(9)]
    points = list(zip(places, spread(places), strict=True))
    for one, other in combinations(points, 2):
        assert hypot(one[0] - other[0], one[1] - other[1]) >= 6 - 1e-6
    assert max(map(abs, spread([1.0] * 30))) == 6


def test_suites_with_one_prompt_each_are_sorted_best_first(tmp_path):
    """Oracle: the order of the accuracies, down the columns, in every form of the figure."""
    tasks = {f"subject_{i:02d}": {"p": 0.2 + 0.01 * (i * 7 % 57)} for i in range(57)}
    (section,) = compare([read_run(write_run(tmp_path / "run", tasks, suite="mmlu", chance=0.25))])
    columns = drawings(section)
    for svgs in (columns, [standalone(section)]):
        values = [
            float(hint.split(": ")[1]) for svg in svgs for hint, _ in hinted(svg) if " · " in hint
        ]
        assert len(values) == 57
        assert values == sorted(values, reverse=True)
    assert len(columns) == 3
    assert section.scale() == (20, 80)


def test_axis_holds_every_value(tmp_path):
    """Oracle: round ends around 0 and 1 and around a narrow range."""
    wide = read_run(write_run(tmp_path / "wide", {"rte": {"a": 0.0, "b": 1.0}}))
    narrow = read_run(write_run(tmp_path / "narrow", {"rte": {"a": 0.51, "b": 0.52}}))
    assert compare([wide])[0].scale() == (0, 100)
    low, high = compare([narrow])[0].scale()
    assert low <= 50 and high >= 52 and high - low >= 20


def test_colours_are_variables_and_the_drawing_repeats(section):
    """Oracle: a second drawing; every colour of a style is a variable or none."""
    svg = standalone(section)
    assert standalone(section) == svg
    body = re.sub(r"<style>.*?</style>", "", svg, flags=re.S)
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", body))
    assert {"var(--run-0)", "var(--run-1)", "var(--ink)", "var(--faint)"} < colours
    assert all(colour == "none" or colour.startswith("var(--") for colour in colours)
    assert not re.search(r"<dc:date>|matplotlib", svg)


def test_texts_with_mathematics_are_shown_as_they_are(tmp_path):
    """Oracle: the text of the drawing."""
    run = read_run(write_run(tmp_path / "run", {"$x_1$ & <b>": {"p": 0.5, "q": 0.6}}))
    texts = [e.text for e in ElementTree.fromstring(standalone(compare([run])[0])).iter()]
    assert "$x 1$ & <b>" in texts
