"""What the pages name exists: files, links, commands and options, configurations."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from metro.cli.main import COMMANDS, load_command

from . import clients
from .pages import PAGES, ROOT, anchors, blocks, commands, links, metro_arguments

PATH = re.compile(
    r"(?<![\w./-])((?:metro|fairseq_plugins|scripts|tests|benchmarks)/[\w./*-]*[\w*/])"
)
FAIRSEQ_OPTIONS = {
    *("--fp16", "--user-dir", "--finetune-from-model", "--use-old-adam"),
    *("--log-format", "--log-file", "--config-dir", "--config-name"),
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def command_of(arguments: list[str]) -> tuple[click.Command, list[str]]:
    command, rest = load_command(arguments[0]), arguments[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def option_names(command: click.Command) -> set[str]:
    names = {"--help", "--help-all"}
    for parameter in command.params:
        names |= {*parameter.opts, *parameter.secondary_opts}
    for child in getattr(command, "commands", {}).values():
        names |= option_names(child)
    return names


@each_page
def test_files_that_are_named_exist(page):
    drawn = [*(ROOT / "docs/images").glob("*.svg")] if page.name == "architecture.md" else []
    text = "".join(path.read_text(encoding="utf-8") for path in (page, *drawn))
    missing = sorted(name for name in set(PATH.findall(text)) if not list(ROOT.glob(name)))
    assert not missing


@each_page
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_commands_parse(page):
    """Oracle: the parser of the command line itself."""
    for block in blocks(page, "sh"):
        for words in commands(block.text):
            arguments = metro_arguments(words)
            if arguments:
                command, rest = command_of(arguments)
                try:
                    command.make_context(arguments[0], rest)
                except click.ClickException as error:
                    pytest.fail(f"{block.where}: {' '.join(words)}: {error.format_message()}")


@each_page
def test_options_in_the_text_exist(page):
    """After a command's name its own options, alone those of any command."""
    known = {"--version", *FAIRSEQ_OPTIONS}.union(
        *(option_names(load_command(n)) for n in COMMANDS)
    )
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        options = {word.split("=")[0] for word in words if re.match(r"--\w", word)}
        if words[0] == "metro" and len(words) > 1 and words[1] in COMMANDS:
            assert options <= option_names(command_of(words[1:])[0]), code
        elif words[0].startswith("--"):
            assert options <= known, code


@each_page
def test_configurations_exist(page):
    for block in blocks(page, "sh"):
        for words in commands(block.text):
            if "--config-name" in words:
                folder = Path(words[words.index("--config-dir") + 1]).name
                name = words[words.index("--config-name") + 1]
                path = ROOT / "fairseq_plugins/configs" / folder / f"{name}.yaml"
                assert path.exists(), block.where


def test_published_configurations_are_all_in_the_table():
    text = (ROOT / "docs/pretraining.md").read_text() + (ROOT / "docs/finetuning.md").read_text()
    plugins = (ROOT / "fairseq_plugins/configs").glob("*/*.yaml")
    for path in [*plugins, *(ROOT / "metro/finetuning/configs").glob("*.yaml")]:
        assert f"`{path.stem}`" in text, path


def test_every_page_is_in_the_navigation():
    def pages_of(entry):
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages_of(child)]

    nav = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = [page.name for page in PAGES if page.parent != ROOT]
    assert sorted(nav) == sorted(["quickstart.md", *pages])  # made of the notebook


def test_readme_is_short_and_narrow():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 110


@pytest.mark.slow
@pytest.mark.parametrize("change", ["", "[x](gone.md)", "[x](report.md#gone)"])
def test_the_site_builds_and_dead_links_fail(tmp_path, change):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs)")
    pytest.importorskip("mkdocstrings_handlers.python")
    for name in ("docs", "mkdocs.yml"):
        subprocess.run(["cp", "-r", ROOT / name, tmp_path], check=True)
    (tmp_path / "metro").symlink_to(ROOT / "metro")
    with (tmp_path / "docs/text.md").open("a") as file:
        file.write(f"\n{change}\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (not change), done.stderr
    assert "gone" in done.stderr if change else (tmp_path / "site/python_api.html").exists()


def test_the_table_of_clients_is_that_of_the_tests():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{clients.BEGIN}{clients.table()}{clients.END}" in page, "python -m tests.docs.clients"
