"""Options of fairseq's configuration classes."""

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, Optional, get_type_hints

from metro.utils.settings import Settings, split_kind


def config_option(default: Any, help: str) -> Any:
    """Declare a field, with the text that fairseq shows for `--help`."""
    return field(default=default, metadata={"help": help})


def options_of(
    settings: type[Settings], without: tuple[str, ...] = (), **defaults: Any
) -> Callable[[type], type]:
    """Give a class the fields of METRO's own options; `@dataclass` goes above.

    Args:
        settings: has them, with their help.
        without: names that are left out.
        defaults: in place of theirs.
    """
    kinds = get_type_hints(settings)

    def add(cls: type) -> type:
        found = {}
        for part in fields(settings):
            if part.name in without or part.name in vars(cls).get("__annotations__", {}):
                continue
            kind, may_be_none = split_kind(kinds[part.name])
            default = defaults.get(part.name, part.default)
            # fairseq reads Optional[...], not X | None
            found[part.name] = Optional[kind] if may_be_none and default is None else kind  # noqa: UP045
            setattr(cls, part.name, config_option(default, part.metadata["help"]))
        cls.__annotations__ = {**found, **vars(cls).get("__annotations__", {})}
        return cls

    return add
