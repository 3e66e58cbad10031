"""The report as page, tables and files.

Oracles: numbers worked out by hand from the runs written here; parsers of the standard library for
HTML, XML and CSV.
"""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from metro.evaluation.report.build import build_sections, find_runs, report, write_report
from metro.evaluation.report.comparison import compare
from metro.evaluation.report.figure import standalone
from metro.evaluation.report.page import page
from metro.evaluation.report.tables import latex, markdown, prompts_csv, signed, tasks_csv
from metro.evaluation.runs.published import PublishedRow
from metro.evaluation.runs.run_folder import read_run
from tests.evaluation.run_folders import PROMPTS, write_run

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


def test_every_format_holds_the_same_numbers(section):
    """Oracle: the values worked out by hand above, with two digits."""
    first = ["59.00", "47.00", "53.00"]
    difference = ["−2.62", "−5.74", "−4.18"]
    table = Page(page("Title", [section])).tables[0]
    assert table[0] == ["", "RTE", "CB", "AVG"]
    assert row_of(table, "METRO-T0-Base")[1:] == first
    assert row_of(table, "to published")[1:] == difference
    assert row_of(table, "mine/checkpoint_last")[1:] == ["70.00†", "50.00", "50.001 of 2"]
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
    assert r"mine/checkpoint\_last & 70.00\dag{} & \textbf{50.00} & 50.00 (1 of 2) \\" in tex

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


def test_only_tasks_of_a_part_of_the_prompts_are_faint(tmp_path, section):
    """Oracle: rte of the second run has 1 prompt of 10; " of " in a prompt's name says nothing."""
    assert page("x", [section]).count('<tr class="part">') == 1
    named = write_run(tmp_path / "named", {"anatomy": {"pick one of these": 0.3}}, suite="mmlu")
    (section,) = compare([read_run(named)])
    assert section.one_prompt and "pick one of these" in page("x", [section])
    assert '<tr class="part">' not in page("x", [section])


def test_differences_are_printed_with_a_sign():
    """Oracle: by hand; what rounds to nothing has no sign of its own."""
    shown = " ".join(signed(x) for x in (0.0123, -0.0123, 0.00001, -0.00001))
    assert shown == "+1.23 −1.23 ±0.00 ±0.00"


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


# ---- folders ---------------------------------------------------------------------------------


def test_report_is_written_whole_and_again(tmp_path):
    """Oracle: the list of files; the earlier report is passed over among the runs."""
    write_run(tmp_path / "results" / "one", PROMPTS, registered="metro_t0_base")
    write_run(tmp_path / "results" / "two", {"winowhy": {"p": 0.5}}, suite="bigbench")
    out = tmp_path / "results" / "report"
    for _ in range(2):
        folders = sorted((tmp_path / "results").iterdir())
        done = report(folders, out=out)
        paths = done.paths
        names = ["report.html", "report.md", "report.tex", "tasks.csv", "prompts.csv", "t0.svg"]
        assert [path.name for path in paths] == [*names, "bigbench.svg"]
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    assert done.tables["t0"].header == ["", "RTE", "CB", "AVG"]
    assert done.tables["t0"].rows[0] == ["METRO-T0-Base", "59.00", "47.00", "53.00"]
    assert "T0 Eval: METRO-T0-Base (direct) 53.00, over 2 tasks" in str(done)
    runs = [path.name for path in find_runs([tmp_path / "results"])]
    assert runs == ["one", "two"]
    assert "METRO-T0-Base" in (out / "report.html").read_text()
    with pytest.raises(ValueError, match="no run of suite 'mmlu': the runs are of t0, bigbench"):
        build_sections(find_runs(folders, out), suite="mmlu")
    (only,) = build_sections(find_runs(folders, out), suite="bigbench")
    assert only.tasks == ["winowhy"]


def test_figures_of_an_earlier_report_do_not_stay(tmp_path):
    """Oracle: by hand: the second report has one of two suites; a drawing of the user's stays."""
    one = write_run(tmp_path / "one", PROMPTS)
    two = write_run(tmp_path / "two", {"winowhy": {"p": 0.5}}, suite="bigbench")
    out = tmp_path / "report"
    write_report(build_sections([one, two]), out)
    (out / "mine.svg").write_text("<svg/>")
    write_report(build_sections([one]), out)
    assert {path.name for path in out.glob("*.svg")} == {"t0.svg", "mine.svg"}
    mixed = tmp_path / "mixed"  # no report: nothing of it is anybody's to delete
    mixed.mkdir()
    (mixed / "bigbench.svg").write_text("<svg/>")
    write_report(build_sections([one]), mixed)
    assert {path.name for path in mixed.glob("*.svg")} == {"t0.svg", "bigbench.svg"}


def test_a_report_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    """Oracle: every file before and after, where the writing of the third one fails."""
    out, one = tmp_path / "report", write_run(tmp_path / "one", PROMPTS)
    two = write_run(tmp_path / "two", {"winowhy": {"p": 0.5}}, suite="bigbench")
    report([one], out=out)
    before = {path.name: path.read_text() for path in out.iterdir()}
    count, real = iter(range(100)), Path.write_text

    def fail(path, *args, **kwargs):
        if next(count) == 2:
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", fail)
        report([two], out=out)
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    report([two], out=out)
    assert {path.name for path in out.glob("*.svg")} == {"bigbench.svg"}
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_suites_never_share_a_figure(tmp_path):
    """Oracle: as many figures as suites, whose names fold alike without a mark."""
    suites = ["评估", "测试", "my suite", "my-suite", "My-suite", "épreuve"]
    runs = [
        write_run(tmp_path / str(number), {"a": {"p": 0.5}}, suite=suite)
        for number, suite in enumerate(suites)
    ]
    done = report(runs, out=tmp_path / "report")
    figures = {path.name.lower() for path in done.paths if path.suffix == ".svg"}
    assert len(figures) == len(suites)
    text = done.paths[0].read_text()
    assert len(set(re.findall(r'<section id="([^"]+)"', text))) == len(suites)


def test_a_run_without_a_result_is_left_out_and_named(tmp_path):
    """Oracle: the report of the other one, and the note; alone it is an error."""
    one, empty = write_run(tmp_path / "one", PROMPTS), write_run(tmp_path / "empty", PROMPTS)
    (empty / "results.jsonl").unlink()
    done = report([one, empty], out=tmp_path / "report")
    assert f"note: {empty} is left out: no prompt is finished" in str(done)
    assert [run.run.folder for run in done.sections[0].runs] == [one]
    with pytest.raises(ValueError, match="empty has no finished prompt yet"):
        report([empty], out=tmp_path / "report")


def test_folders_that_are_no_runs_are_refused(tmp_path):
    """Oracle: the folders made here; every message names the folder and the remedy."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run folder"):
        find_runs([empty])
    with pytest.raises(ValueError, match=r"away is not a folder"):
        find_runs([tmp_path / "away"])
    with pytest.raises(ValueError, match="no run to report on"):
        find_runs([])
    run = write_run(tmp_path / "run", {"rte": {"a": 0.5}})
    with pytest.raises(ValueError, match=r"run is given twice"):
        build_sections([run, tmp_path / "empty" / ".." / "run"])
    (run / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"run has no finished prompt yet"):
        build_sections([run])
