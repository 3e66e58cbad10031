"""promptsource's templates are fetched once, from the one pinned package, and nothing else."""

import gzip
import hashlib
import io
import os
import tarfile

import pytest

from metro.data.prompts import template_download
from metro.data.prompts.template_download import fetch_templates, unpack
from metro.data.prompts.templates import find_templates
from metro.utils.messages import UserError
from tests.data.prompts.test_templates import YAML


def package(extra: dict[str, str] | None = None, link: str | None = None) -> bytes:
    """The same bytes whenever it is made, as its checksum is compared."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        for name, text in {
            "p-1/LICENSE": "Apache",
            "p-1/setup.py": "raise SystemExit",
            "p-1/promptsource/templates.py": "raise SystemExit",
            "p-1/promptsource/templates/toy/small/templates.yaml": YAML,
            **(extra or {}),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        if link:
            member = tarfile.TarInfo("p-1/promptsource/templates/linked/templates.yaml")
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METRO_TEMPLATES", raising=False)
    content = package()
    monkeypatch.setattr(template_download, "SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path


def files_below(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_fetch_reads_an_index_and_serves_every_command(cache):
    """A local index of the form that package indexes have."""
    (cache / "simple/promptsource").mkdir(parents=True)
    (cache / "simple/promptsource" / template_download.PACKAGE).write_bytes(package())
    (cache / "simple/promptsource/index.html").write_text(
        f'<a href="promptsource-0.1.tar.gz#sha256=00">old</a>'
        f'<a href="{template_download.PACKAGE}#sha256=1" data-requires-python="&lt;3.10">new</a>'
    )
    # A server would answer a folder with its index.html.
    index = (cache / "simple").as_uri()
    real, asked = template_download._get, []

    def get(url):
        asked.append(url)
        return real(url + "index.html" if url.endswith("/") else url)

    template_download._get = get
    try:
        fetched = fetch_templates(index=index)
    finally:
        template_download._get = real
    assert not fetched.was_there and fetched.num_files == 1 and len(asked) == 2
    assert files_below(fetched.folder) == ["LICENSE", "toy/small/templates.yaml"]
    assert find_templates().datasets() == [("toy", "small")]
    assert fetch_templates(index="https://nowhere.invalid").was_there
    assert os.listdir(fetched.folder.parent) == [fetched.folder.name]


def test_another_package_is_refused_and_nothing_is_left(cache):
    (cache / "other.tar.gz").write_bytes(package({"p-1/more": "x"}))
    with pytest.raises(ValueError, match="not the pinned package: its sha256 is"):
        fetch_templates(file=cache / "other.tar.gz")
    assert not (cache / "cache").exists()
    with pytest.raises(UserError, match="give the source package"):
        fetch_templates(file=cache / "none.tar.gz")


def test_fetching_again_replaces_what_is_there(cache):
    (cache / "p.tar.gz").write_bytes(package())
    folder = fetch_templates(file=cache / "p.tar.gz").folder
    (folder / "toy/small/templates.yaml").write_text("changed")
    assert fetch_templates(file=cache / "p.tar.gz").was_there
    fetch_templates(file=cache / "p.tar.gz", again=True)
    assert (folder / "toy/small/templates.yaml").read_text() == YAML


def test_no_network_is_one_line_with_a_remedy(cache):
    with pytest.raises(ValueError, match="cannot download .*--file") as caught:
        fetch_templates(index="http://user:secret@localhost:9/simple")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_members_cannot_leave_the_folder(tmp_path):
    hostile = {
        "p-1/promptsource/templates/../../../../escaped/templates.yaml": "x",
        "/promptsource/templates/abs/templates.yaml": "x",
        "p-1/promptsource/templates/toy/evil.py": "x",
        "p-1/promptsource/templates/./dot/templates.yaml": "x",
    }
    unpack(package(hostile, link="/etc/passwd"), tmp_path / "in/tree")
    assert files_below(tmp_path / "in/tree") in (
        ["LICENSE", "toy/small/templates.yaml"],
        ["LICENSE", "dot/templates.yaml", "toy/small/templates.yaml"],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_unpacks_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(template_download, "_MAX_BYTES", 100)
    with pytest.raises(ValueError, match="unpacks to more than"):
        unpack(package(), tmp_path / "tree")
