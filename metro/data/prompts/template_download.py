"""`metro templates fetch`: promptsource's templates, from its source package into the cache.

promptsource itself does not install on current Python versions, and nothing of it is run: the one
pinned source package is downloaded, its checksum compared, and its ``templates.yaml`` files are
taken out.
"""

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from metro.utils.files import cache_folder
from metro.utils.messages import UserError
from metro.utils.network import is_reachable

PROMPTSOURCE_VERSION = "0.2.3"
PACKAGE = f"promptsource-{PROMPTSOURCE_VERSION}.tar.gz"
SHA256 = "f106c889778a0fe5590e7183904bf964e1a01691c8a29451e44f3df5ddef05f5"
DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT_SECONDS = 60
_MAX_BYTES = 50_000_000
_MEMBER = re.compile(r"[^/]+/promptsource/templates/((?:[\w.+-]+/)+templates\.yaml)")
_LICENCE = re.compile(r"[^/]+/LICENSE")


class FetchedTemplates(NamedTuple):
    """Result of ``fetch_templates``."""

    folder: Path
    num_files: int
    was_there: bool


def templates_folder() -> Path:
    """Return the folder of the fetched tree, there or not."""
    return cache_folder() / "templates" / f"promptsource-{PROMPTSOURCE_VERSION}"


def cached_templates() -> Path | None:
    """Return the fetched tree, if it is there (it appears complete or not at all)."""
    folder = templates_folder()
    return folder if folder.is_dir() else None


def fetch_templates(
    *, file: str | Path | None = None, index: str | None = None, again: bool = False
) -> FetchedTemplates:
    """Put promptsource's templates into the cache, unless they are there.

    Args:
        file: the source package, downloaded by other means.
        index: a package index in place of ``$PIP_INDEX_URL`` or the public one.
        again: replace what is there.

    Raises:
        UserError: the package is not available, or is not the one that was pinned.
    """
    folder = templates_folder()
    if folder.is_dir() and not again:
        return FetchedTemplates(folder, _count(folder), True)
    content = _read_package(Path(file)) if file else _download(index)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(
            f"{file or PACKAGE} is not the pinned package: its sha256 is {found}, and {SHA256} was "
            "expected; nothing was unpacked"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as work:
        tree = Path(work) / "tree"
        unpack(content, tree)
        if again and folder.is_dir():
            folder.rename(Path(work) / "old")
        try:
            tree.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker, with the same files
                raise
    return FetchedTemplates(folder, _count(folder), False)


def unpack(package: bytes, folder: Path) -> None:
    """Write the ``templates.yaml`` files and the licence of a source package, nothing else.

    Names are matched, not trusted: a member cannot be written outside ``folder``.
    """
    import io

    folder.mkdir(parents=True)
    total = 0
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        for member in archive:
            match = _MEMBER.fullmatch(member.name)
            name = match[1] if match else "LICENSE" if _LICENCE.fullmatch(member.name) else None
            if name is None or not member.isfile() or ".." in name.split("/"):
                continue
            total += member.size
            if total > _MAX_BYTES:
                raise UserError(f"the package unpacks to more than {_MAX_BYTES:,} bytes")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None  # it is a file
            with content, target.open("wb") as out:
                shutil.copyfileobj(content, out)


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("templates.yaml"))


def _read_package(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"no file {path}: give the source package {PACKAGE}")
    return path.read_bytes()


def _download(index: str | None) -> bytes:
    """Download the package, found on the index's page of promptsource."""
    index = (index or os.environ.get("PIP_INDEX_URL") or DEFAULT_INDEX).rstrip("/")
    page = f"{index}/promptsource/"
    remedy = (
        f"download {PACKAGE} by other means and give it with --file, or name a mirror with --index"
    )
    if not page.startswith("file:") and not is_reachable(page):
        raise UserError(f"cannot download {PACKAGE}: {_public(page)} cannot be reached; {remedy}")
    try:
        text = _get(page).decode("utf-8", "replace")
        links = re.findall(r'href="([^"]+)"', text)
        wanted = [link for link in links if urllib.parse.urlsplit(link).path.endswith(PACKAGE)]
        if not wanted:
            raise UserError(f"{_public(page)} lists no {PACKAGE}: {remedy}")
        return _get(urllib.parse.urljoin(page, wanted[0].replace("&amp;", "&")))
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download {PACKAGE} from {_public(page)}: {reason}; {remedy}"
        ) from None


def _get(url: str) -> bytes:
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ("http", "https", "file"):
        raise UserError(f"{_public(url)} is not an address of a package index")
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS, context=_tls()) as answer:
        content = answer.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise UserError(f"{_public(url)} is larger than {_MAX_BYTES:,} bytes")
    return content


def _tls():
    """Return a TLS context with the certificates that pip is told to use, if any."""
    import ssl

    certificates = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE")
    return ssl.create_default_context(cafile=certificates or None)


def _public(url: str) -> str:
    """Remove a password from an address."""
    return re.sub(r"//[^/@]*@", "//", url)
