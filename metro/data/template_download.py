"""`metro templates fetch`: promptsource's templates, out of its source package into the cache."""

import os
from pathlib import Path

PROMPTSOURCE_VERSION = "0.2.3"


def cache_folder() -> Path:
    """``$METRO_CACHE``, else ``$XDG_CACHE_HOME/metro``, else ``~/.cache/metro``."""
    if folder := os.environ.get("METRO_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metro"


def templates_folder() -> Path:
    """Where `fetch` puts the tree."""
    return cache_folder() / "templates" / f"promptsource-{PROMPTSOURCE_VERSION}"


def cached_templates() -> Path | None:
    """The fetched tree, if it is there (it appears complete or not at all)."""
    folder = templates_folder()
    return folder if folder.is_dir() else None
