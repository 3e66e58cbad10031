"""Options of fairseq's configuration classes."""

from dataclasses import field
from typing import Any


def config_option(default: Any, help: str) -> Any:
    """Declare a field, with the text that fairseq shows for `--help`."""
    return field(default=default, metadata={"help": help})
