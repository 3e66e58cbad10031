"""Runs beside published rows, as page, tables and figures.

Oracles: numbers worked out by hand from the runs written here and from `checkpoints/registry.yaml`;
parsers of the standard library for HTML, XML and CSV.
"""

import csv
import io
import re
from html.parser import HTMLParser
from itertools import combinations
from math import hypot
from xml.etree import ElementTree

import pytest

from metro.conversion.registry import registered_models
from metro.evaluation.comparison import compare
from metro.evaluation.naming import short_model_name
from metro.evaluation.published import PublishedRow, merge_agreeing, published_rows
from metro.evaluation.report import build_sections, find_runs, write_report
from metro.evaluation.report_figure import make_scale, standalone
from metro.evaluation.report_page import page
from metro.evaluation.report_tables import latex, markdown, prompts_csv, signed, tasks_csv
from metro.evaluation.results import PromptResult, Run, read_run
from metro.evaluation.svg_marks import spread
from tests.evaluation.run_folders import write_run

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "input", "link", "br", "img", "hr"}
EVIL = """<script>alert("x")</script> & 'quoted' | =1+1 _under_ \\ {brace} % $ #"""


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order. Tables as lists of texts."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tables, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & set(self.open) and "title" not in self.open:
            self.tables[-1][-1][-1] += data


def row_of(table: list[list[str]], name: str) -> list[str]:
    """The first line of that name."""
    return next(line for line in table if line[0].strip() == name)


PROMPTS = {
    "rte": {f"prompt {i}": 0.5 + 0.02 * i for i in range(10)},  # mean 0.59
    "cb": {"a": 0.40, "b": 0.45, "c": 0.56},  # mean 0.47
}
PUBLISHED = [
    PublishedRow("metro_t0_base", "METRO-T0-Base", "t0", "card", {"rte": 0.6162, "cb": 0.5274}),
    PublishedRow("metro_t0_base", "METRO-T0-Base", "t0", "paper", {"rte": 0.6518, "cb": 0.4560}),
    PublishedRow("t0_3b", "T0-3B", "t0", "paper", {"rte": 0.6455}),
    PublishedRow("t0_3b", "T0-3B", "bigbench", "paper", {"winowhy": 0.6455}),
]
TITLES = {"metro_t0_base": "METRO-T0-Base"}


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


def test_rows_are_those_worked_out_by_hand(section):
    """Oracle: 0.59 - 0.6162 = -0.0262, 0.47 - 0.5274 = -0.0574; averages are means of the tasks."""
    first, difference, second, card, paper, other, chance = section.rows
    kinds = [row.kind for row in section.rows]
    assert kinds == ["run", "difference", "run", *["published"] * 3, "chance"]
    assert first.label == "METRO-T0-Base"
    assert first.values == pytest.approx({"rte": 0.59, "cb": 0.47})
    assert first.average == pytest.approx(0.53)
    assert difference.detail == "card"
    assert difference.values == pytest.approx({"rte": -0.0262, "cb": -0.0574})
    assert difference.average == pytest.approx(-0.0418)
    assert second.label == "mine"
    assert second.partial == {"rte"} and second.values["rte"] == 0.7
    assert (second.average, second.num_averaged) == (0.5, 1)
    assert card.average == pytest.approx((0.6162 + 0.5274) / 2)
    assert card.compared and not paper.compared
    assert other.average is None  # it has no number for cb
    assert chance.values == {"rte": 0.5, "cb": 0.5}


def test_a_partial_task_is_never_the_best(section):
    """Oracle: 0.7 of one prompt against 0.59 of ten; 0.5 against 0.47."""
    first, _, second = section.rows[:3]
    assert first.best == {"rte"}
    assert second.best == {"cb"}  # averages are over different tasks: none is best


def test_difference_averages_over_tasks_that_both_have(tmp_path):
    """Oracle: by hand, cb is not published, so the average difference is that of rte."""
    run = read_run(write_run(tmp_path / "run", PROMPTS, registered="t0_3b"))
    (section,) = compare([run], PUBLISHED)
    difference = section.rows[1]
    assert difference.values == pytest.approx({"rte": 0.59 - 0.6455})
    assert (difference.average, difference.num_averaged) == (difference.values["rte"], 1)


def test_averages_of_published_rows_are_over_the_tasks_shown(tmp_path):
    """Oracle: by hand; a note says that the suite has more tasks."""
    run = read_run(
        write_run(tmp_path / "run", {"cb": {"a": 0.5}}, listed={"cb": ["a"], "rte": ["a"]})
    )
    (section,) = compare([run], PUBLISHED)
    assert section.tasks == ["cb"]
    assert section.rows[1].average == 0.5274
    assert any("1 tasks shown; the suite lists 2" in note for note in section.notes)


def test_suites_make_sections_that_do_not_mix(tmp_path):
    """Oracle: two suites given in turns."""
    runs = [
        read_run(write_run(tmp_path / name, {task: {"p": 0.5}}, suite=suite))
        for name, suite, task in [
            ("a", "t0", "rte"),
            ("b", "bigbench", "winowhy"),
            ("c", "t0", "cb"),
        ]
    ]
    sections = compare(runs, PUBLISHED)
    assert [section.suite for section in sections] == ["t0", "bigbench"]
    assert sections[0].tasks == ["rte", "cb"] and sections[1].tasks == ["winowhy"]
    assert [row.suite for row in sections[1].published] == ["bigbench"]


def test_label_generalisation_shows_macro_f1(tmp_path):
    """Oracle: the paper's metric; the runs written here have a macro-F1 of half the accuracy."""
    folder = write_run(tmp_path / "run", {"cb": {"a": 0.5}}, suite="label_generalization")
    (section,) = compare([read_run(folder)])
    assert section.rows[0].values == {"cb": 0.25}
    assert [row.kind for row in section.rows] == ["run"]  # nobody states a chance of macro-F1
    assert "Macro-F1" in page("x", [section])


# ---- published rows --------------------------------------------------------------------------


def test_all_published_rows_of_the_registry_are_shown():
    """Oracle: the registry; every number of it is in the row of its model."""
    rows = published_rows(["all"])
    for model in registered_models().values():
        for table in model.published:
            for task, accuracy in table["results"].items():
                assert any(
                    row.model == model.name
                    and row.suite == table["suite"]
                    and table["source"] in row.source
                    and abs(row.values.get(task, 9) - accuracy / 100) < 0.00021
                    for row in rows
                ), (model.name, table["source"], task)


def test_the_card_of_a_base_model_comes_before_the_table_it_differs_from():
    """Oracle: metro_t0_base, 61.62 on its card and 65.18 in the paper; base++ agrees in both."""
    base = [row for row in published_rows(["metro_t0_base"]) if row.suite == "t0"]
    assert [row.values["rte"] for row in base] == [0.6162, 0.6518]
    (basepp,) = published_rows(["metro_t0_basepp"])
    assert len(basepp.values) == 11 and basepp.source.startswith("model card")


def test_a_row_within_another_is_merged_into_it():
    """Oracle: by hand."""
    few = PublishedRow("m", "M", "t0", "card", {"rte": 0.5})
    more = PublishedRow("m", "M", "t0", "paper", {"rte": 0.5001, "cb": 0.4})
    (merged,) = merge_agreeing([few, more])
    assert merged.values == more.values and merged.source == "card; paper"
    other = PublishedRow("m", "M", "t0", "paper", {"rte": 0.51, "cb": 0.4})
    assert merge_agreeing([few, other]) == [few, other]
    elsewhere = PublishedRow("m", "M", "mmlu", "paper", {"rte": 0.5})
    assert merge_agreeing([few, elsewhere]) == [few, elsewhere]


def test_published_rows_are_selected_by_name():
    """Oracle: the names given; hub ids and commas work, a wrong name gets the nearest."""
    assert published_rows(["none"]) == []
    named = published_rows(["t0_3b,flipped_3b"])
    assert {row.model for row in named} == {"t0_3b", "flipped_3b"}
    assert {row.model for row in published_rows(["bigscience/T0"])} == {"t0_11b"}
    with pytest.raises(ValueError, match="metro_t0_base"):
        published_rows(["metro_t0_bsae"])
    with pytest.raises(ValueError, match="all and none stand alone"):
        published_rows(["all", "t0_3b"])


# ---- formats ---------------------------------------------------------------------------------


def test_every_format_holds_the_same_numbers(section):
    """Oracle: the values worked out by hand above, with two digits."""
    first = ["59.00", "47.00", "53.00"]
    difference = ["−2.62", "−5.74", "−4.18"]
    table = Page(page("Title", [section])).tables[0]
    assert table[0] == ["", "RTE", "CB", "AVG"]
    assert row_of(table, "METRO-T0-Base")[1:] == first
    assert row_of(table, "to published")[1:] == difference
    assert row_of(table, "mine")[1:] == ["70.00†", "50.00", "50.001 of 2"]
    assert row_of(table, "T0-3B b")[1:] == ["64.55", "", ""]
    assert row_of(table, "guessing")[1:] == ["50.00"] * 3

    lines = markdown("Title", [section]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["METRO-T0-Base", *first] in cells
    assert ["to published", *difference] in cells
    assert ["METRO-T0-Base, published (a)", "61.62", "52.74", "57.18"] in cells

    tex = latex("Title", [section])
    assert r"METRO-T0-Base & \textbf{59.00} & 47.00 & 53.00 \\" in tex
    assert r"to published & $-$2.62 & $-$5.74 & $-$4.18 \\" in tex
    assert r"mine & 70.00\dag{} & \textbf{50.00} & 50.00 (1 of 2) \\" in tex

    found = list(csv.DictReader(io.StringIO(tasks_csv([section]))))
    rte = next(row for row in found if row["task"] == "rte" and row["kind"] == "run")
    assert float(rte["value"]) == pytest.approx(0.59)
    assert float(rte["difference"]) == pytest.approx(-0.0262)
    assert (rte["complete"], rte["prompts"], rte["chance"]) == ("True", "10", "0.5")
    assert [row["value"] for row in found if row["model"] == "T0-3B"] == ["0.6455"]
    prompts = list(csv.DictReader(io.StringIO(prompts_csv([section]))))
    assert len(prompts) == 13 + 4
    assert {row["prompt"]: float(row["accuracy"]) for row in prompts[10:13]} == PROMPTS["cb"]


def test_tables_have_as_many_cells_in_every_line(tmp_path, section):
    """Oracle: the header; for tasks across and for tasks down the page."""
    tasks = {f"a_subject_with_a_long_name_{i}": {"p": 0.3} for i in range(57)}
    (long,) = compare([read_run(write_run(tmp_path / "long", tasks, suite="mmlu"))])
    for each in (section, long):
        assert len({len(line) for line in Page(page("x", [each])).tables[0]}) == 1
        blocks = re.findall(r"(?:^\|.*\n)+", markdown("x", [each]), re.M)
        assert blocks
        for block in blocks:
            assert len({line.count("|") for line in block.splitlines()}) == 1
        body = latex("x", [each]).split(r"\toprule")[1].split(r"\bottomrule")[0]
        assert len({line.count("&") for line in body.splitlines() if "&" in line}) == 1
    assert len(Page(page("x", [long])).tables[0]) == 1 + 57 + 1  # header, subjects, average


def test_differences_are_printed_with_a_sign():
    """Oracle: by hand; what rounds to nothing has no sign of its own."""
    assert [signed(x) for x in (0.0123, -0.0123, 0.00001, -0.00001)] == [
        "+1.23",
        "−1.23",
        "±0.00",
        "±0.00",
    ]


def test_page_is_self_contained(section):
    """Oracle: no attribute or style rule that would make a browser fetch something."""
    text = page("x", [section])
    read = Page(text)
    for tag, name, value in read.attributes:
        assert name not in ("src", "srcset", "data", "onclick", "onload"), (tag, name)
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    assert read.tags.count("script") == 1 and read.tags.count("style") == 1


def test_texts_of_files_are_shown_and_never_run(tmp_path):
    """Oracle: the parsers see a text with markup in model, prompt, task, option as text."""
    folder = write_run(
        tmp_path / "run",
        {EVIL: {EVIL: 0.5, "=2+2": 0.4}},
        model=EVIL,
        suite=EVIL,
        options={EVIL: EVIL, "split": EVIL},
    )
    published = [PublishedRow("m", EVIL, EVIL, EVIL, {EVIL: 0.5})]
    sections = compare([read_run(folder)], published)
    text = page(EVIL, sections)
    read = Page(text)
    assert read.tags.count("script") == 1
    assert "alert(" in text and '<script>alert("x")' not in text
    assert [line[1] for line in read.tables[2][1:]] == [EVIL, "=2+2"]  # per prompt

    ElementTree.fromstring(standalone(sections[0]))
    rows = list(csv.DictReader(io.StringIO(prompts_csv(sections))))
    assert [row["prompt"] for row in rows] == [EVIL, "'=2+2"]  # no formula for a spreadsheet
    marked = markdown(EVIL, sections)
    assert "<script" not in marked
    block = re.search(r"(?:^\|.*\n)+", marked, re.M)[0]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    tex = latex(EVIL, sections)
    assert r"\_under\_ \textbackslash{} \{brace\} \% \$ \#" in tex


# ---- figure ----------------------------------------------------------------------------------


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


# ---- folders ---------------------------------------------------------------------------------


def test_report_is_written_whole_and_again(tmp_path):
    """Oracle: the list of files; the earlier report is passed over among the runs."""
    write_run(tmp_path / "results" / "one", PROMPTS, registered="metro_t0_base")
    write_run(tmp_path / "results" / "two", {"winowhy": {"p": 0.5}}, suite="bigbench")
    out = tmp_path / "results" / "report"
    for _ in range(2):
        folders = sorted((tmp_path / "results").iterdir())
        sections = build_sections(find_runs(folders, out))
        paths = write_report(sections, out)
        names = ["report.html", "report.md", "report.tex", "tasks.csv", "prompts.csv", "t0.svg"]
        assert [path.name for path in paths] == [*names, "bigbench.svg"]
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    assert find_runs([tmp_path / "results"]) == [
        tmp_path / "results" / "one",
        tmp_path / "results" / "two",
    ]
    assert "METRO-T0-Base" in (out / "report.html").read_text()
    with pytest.raises(ValueError, match="no run of suite 'mmlu': the runs are of t0, bigbench"):
        build_sections(find_runs(folders, out), suite="mmlu")
    (only,) = build_sections(find_runs(folders, out), suite="bigbench")
    assert only.tasks == ["winowhy"]


def test_folders_that_are_no_runs_are_refused(tmp_path):
    """Oracle: the folders made here; every message names the folder and the remedy."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run folder"):
        find_runs([empty])
    with pytest.raises(ValueError, match=r"away is no folder"):
        find_runs([tmp_path / "away"])
    with pytest.raises(ValueError, match="no run to report on"):
        find_runs([])
    run = write_run(tmp_path / "run", {"rte": {"a": 0.5}})
    with pytest.raises(ValueError, match=r"run is given twice"):
        build_sections([run, tmp_path / "empty" / ".." / "run"])
    (run / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"run has no finished prompt yet"):
        build_sections([run])


def test_labels_and_colours_tell_runs_apart(tmp_path):
    """Oracle: by hand: model, then method where the report has several of it, then folder; a model
    and method keep their colour from section to section."""

    def run(folder, model, method="direct", suite="t0", registered=None):
        results = [PromptResult(suite, "rte", "p", method, 10, 0.5)]
        return Run(tmp_path / folder, model, method, suite, registered, results=results)

    def labels(*runs):
        sections = compare(runs, (), {"m": "Model M"})
        return [[(each.label, each.colour) for each in section.runs] for section in sections]

    assert labels(run("a", "x/one"), run("b", "two")) == [[("one", 0), ("two", 1)]]
    assert labels(run("a", "x/one"), run("b", "x/one", "flipped"), run("c", "two")) == [
        [("one, direct", 0), ("one, flipped", 1), ("two", 2)]
    ]
    assert labels(run("a", "x"), run("b", "two", suite="mmlu"), run("c", "x", suite="mmlu")) == [
        [("x", 0)],
        [("two", 1), ("x", 0)],
    ]
    assert labels(run("a", "one"), run("b", "one")) == [[("one, a", 0), ("one, b", 1)]]
    assert labels(run("a", "hub", registered="m")) == [[("Model M", 0)]]
    assert short_model_name("runs/mine/checkpoint_last.pt") == "mine"
    assert short_model_name("runs/mine/direct/") == "mine/direct"
    assert short_model_name("google/t5-small") == "t5-small"


def test_a_model_is_compared_with_rows_of_its_method_only(tmp_path):
    """Oracle: flipped_3b is published by method flipped; evaluated directly it is another thing."""
    rows = published_rows(["flipped_3b"])
    for method, compared in [("flipped", True), ("direct", False)]:
        folder = write_run(
            tmp_path / method, {"rte": {"p": 0.5}}, method=method, registered="flipped_3b"
        )
        (section,) = compare([read_run(folder)], rows)
        assert ("difference" in [row.kind for row in section.rows]) == compared


def test_what_is_true_of_all_runs_is_said_once(tmp_path):
    """Oracle: by hand: both limited, one partial."""
    both = {"options": {"limit": 8}}
    one = write_run(tmp_path / "one", {"rte": {"a": 0.5}}, model="one", **both)
    two = write_run(
        tmp_path / "two", {"rte": {"a": 0.5}}, model="two", listed={"rte": ["a", "b"]}, **both
    )
    (section,) = compare([read_run(one), read_run(two)])
    assert len([note for note in section.notes if note.startswith("limited to 8")]) == 1
    assert any(note.startswith("two: partial, ") for note in section.notes)
