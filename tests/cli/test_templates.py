"""`metro templates fetch` as a user meets it, from a file: tests need no network."""

from tests.cli.test_main import run_metro
from tests.data.prompts.test_template_download import package


def test_wrong_package_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "p.tar.gz").write_bytes(package())
    done = run_metro(
        "templates", "fetch", "--file", str(tmp_path / "p.tar.gz"), METRO_CACHE=str(tmp_path / "c")
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not the pinned package" in done.stderr
    assert not (tmp_path / "c").exists()


def test_missing_templates_name_the_command_that_fetches_them(tmp_path):
    done = run_metro("prompts", "list", METRO_CACHE=str(tmp_path), METRO_TEMPLATES="")
    assert done.returncode == 2 and "metro templates fetch" in done.stderr
