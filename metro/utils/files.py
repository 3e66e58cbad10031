"""Files: JSON and YAML, and atomic output, which is complete or absent.

Everything is written under a hidden name beside its destination, flushed to disk, and moved into
place at the end. A killed process leaves such a hidden folder or file behind; the next call for the
same destination removes it.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metro.utils.characters import bad_character
from metro.utils.locks import locked
from metro.utils.messages import UserError

SEAL = "crc32"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_output(out: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output that exists, or whose replacement would delete more than an export.

    Args:
        out: folder or file to write.
        overwrite: it may exist already.
        inputs: files and folders that are read to write it.

    Raises:
        UserError: it exists, or replacing it would not be safe.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{out} exists: choose another name, or replace it with --overwrite")
    place = out.resolve()
    if place.is_dir():
        below = [path for path in (Path.cwd(), *inputs) if path.resolve().is_relative_to(place)]
        folders = sorted(path.name for path in place.iterdir() if path.is_dir())
        if below or folders:
            what = below[0] if below else f"the folder {folders[0]}"
            raise UserError(
                f"{out} is not replaced, as {what} is in it and would be lost: choose another name"
            )
    elif place in [path.resolve() for path in inputs]:
        raise UserError(f"{out} is an input of this command: choose another name")


WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors that a write to an open file ends in: they say nothing of the file."""
WRITE_FAILED = re.compile("PytorchStreamWriter|inline_container|iostream error")
"""torch's words for them, which lack the reason."""


@contextlib.contextmanager
def naming(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Let the error of a failed write name a file or folder, whichever library raises it.

    Args:
        path: what is written in the block.
        instead_of: the temporary place of ``path``, by which a user does not know it.

    Raises:
        OSError: the disk is full, or another limit was reached.
        UserError: a library does not say which one.
    """
    try:
        yield
    except OSError as error:
        name = str(error.filename or "")
        if not name and error.errno in WRITE_ERRORS:
            error.filename = str(path)
        elif instead_of is not None and name.startswith(str(instead_of)):
            error.filename = str(path) + name[len(str(instead_of)) :]
        raise
    except Exception as error:
        safetensors = re.search(r"\(os error (\d+)\)", str(error))
        if safetensors and (number := int(safetensors[1])) in {*WRITE_ERRORS, errno.EROFS}:
            raise OSError(number, os.strerror(number), str(path)) from error
        cause = error.__context__
        if isinstance(cause, OSError) and cause.errno in WRITE_ERRORS and not cause.filename:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        if isinstance(error, RuntimeError) and WRITE_FAILED.search(str(error)):
            raise UserError(
                f"{path} cannot be written whole: the disk is full, your quota is used up or "
                "`ulimit -f` is reached: make room or use another disk"
            ) from error
        raise


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``out`` when the block ends without an error.

    With ``overwrite`` an existing folder stays as it is until then.

    Raises:
        UserError: see :func:`check_output`.
    """
    check_output(out, overwrite, inputs)
    if out.is_file():
        raise UserError(f"{out} is a file: choose another name for the folder")
    out = out.resolve()  # a link stays; its target is replaced
    with _locked_temporary(out, tempfile.mkdtemp) as temporary, naming(out, temporary):
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_dir() or path.stat().st_nlink == 1:  # else a file that is elsewhere too
                os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())
            flush(path)
        flush(temporary)
        if out.exists():
            check_output(out, overwrite, inputs)
            _exchange(temporary, out)
        else:
            os.rename(temporary, out)  # fails if another process has just created `out`
        flush(out.parent)


@contextlib.contextmanager
def new_file(out: Path, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a file to write, which becomes ``out`` when the block ends without an error.

    Raises:
        UserError: see :func:`check_output`.
    """
    check_output(out, overwrite, inputs)
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file in it")
    out = out.resolve()

    def make_file(**place) -> str:
        descriptor, name = tempfile.mkstemp(**place)
        os.close(descriptor)
        return name

    with _locked_temporary(out, make_file) as temporary, naming(out, temporary):
        yield temporary
        flush(temporary)
        os.replace(temporary, out)
        flush(out.parent)


@contextlib.contextmanager
def _locked_temporary(out: Path, make: Callable[..., str]) -> Iterator[Path]:
    """Yield a hidden path beside ``out``, removed at the end; meanwhile ``out`` is locked."""
    prefix = f".{out.name}.incomplete-"
    with locked(out):
        for left in out.parent.iterdir():
            if left.name.startswith(prefix):  # by a killed process
                _remove(left)
        temporary = Path(make(prefix=prefix, dir=out.parent))
        try:
            os.chmod(temporary, (0o777 if temporary.is_dir() else 0o666) & ~_umask())
            yield temporary
        finally:
            _remove(temporary)  # incomplete, or the folder that was replaced


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_name(name: str, *, keep_case: bool = False) -> str:
    """Return a name for a file or folder: different names have different ones, on every disk.

    Args:
        name: any text; a short one of plain letters, digits and ``_.+-`` stays as it is.
        keep_case: let capitals stay as they are; where names that differ in them alone share a
            file on some disks, something else must tell them apart.
    """
    plain = name if keep_case else name.lower()
    if plain == name and re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,99}", name):
        return name
    readable = re.sub(r"[^\w+-]+", "-", name).encode()[:60].decode(errors="ignore").strip("-")
    mark = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:10]
    return f"{readable}-{mark}" if readable else mark


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a crash leaves the old or the new one, complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, indent: int = 1, *, seal: bool = False) -> None:
    """Replace a JSON file atomically; NaN and infinity, which JSON does not have, are refused."""
    content = sealed(content) if seal else content
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; return None if it does not exist.

    Raises:
        UserError: it is not JSON, or is not what was sealed.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not the JSON file that METRO wrote: copy it again") from None
    return unsealed(content, str(path))


def sealed(content: dict) -> dict:
    """Add the checksum of a JSON object to it, as its field ``crc32``."""
    content = json.loads(json.dumps(content))  # its keys are texts then
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, SEAL: f"{zlib.crc32(text.encode()):08x}"}


def unsealed(content: Any, where: str) -> Any:
    """Return JSON without its checksum, and unchanged if it has none.

    Raises:
        UserError: it is not what was sealed.
    """
    if not isinstance(content, dict) or SEAL not in content:
        return content
    bare = {name: value for name, value in content.items() if name != SEAL}
    if sealed(bare) != content:
        raise UserError(
            f"{where} was damaged or changed since METRO wrote it: make it again (after a change "
            f"on purpose take out its {SEAL!r})"
        )
    return bare


def read_yaml(path: Path) -> Any:
    """Read a YAML file; only plain data is built.

    Raises:
        UserError: it is not YAML, a key is there twice, or a text has a character that none has.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses the second of equal keys, which would replace the first, and bad characters."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                name = self.construct_object(key, deep=True)
                if repr(name) in seen:
                    line = key.start_mark.line + 1
                    raise UserError(f"{path}, line {line}: the key {name!r} is there twice")
                seen.add(repr(name))
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node):
            if found := bad_character(node.value):
                raise UserError(f"{path}, line {node.start_mark.line + 1}: a text with {found}")
            return super().construct_scalar(node)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def cache_folder() -> Path:
    """``$METRO_CACHE``, else ``$XDG_CACHE_HOME/metro``, else ``~/.cache/metro``."""
    if folder := os.environ.get("METRO_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metro"


def inside(folder: Path, name: str) -> Path:
    """Return the path of what a manifest, an index or a suite names in a folder.

    Raises:
        UserError: the name leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise UserError(
            f"the name {name!r} leads out of {folder}: nothing there is read or changed"
        )
    return folder / name


def link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        flush(target)


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, atomically if the system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(new), os.fsencode(old))
        if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), "cannot replace the folder", str(old))
    aside = new.with_name(f"{new.name}-previous")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
