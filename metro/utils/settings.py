"""Settings: one dataclass per command is its command line, its YAML file and its Python arguments.

    @dataclass(kw_only=True)
    class CountSettings(Settings):
        "Options of counting."

        path: Path = option(help="File to count.", positional=True)
        unit: str = option("lines", "Unit.", choices=("lines", "tokens"))
        limit: int | None = option(None, "At most so many.", least=1)

``CountSettings(path="a.txt", limit=5)`` coerces and checks the values; ``combine`` reads a YAML
file first; `metro.cli.options` makes the command. Nothing heavy is imported here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from metro.utils.files import read_yaml
from metro.utils.messages import UserError, did_you_mean

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
"""Of training: the type of its products, while weights are in float32."""
PRECISION_FLAGS = "--precision,--dtype"
"""Where nothing is trained, one type for weights and products, also in PyTorch's spellings."""


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    flag: str | None = None,
    positional: bool = False,
    metavar: str | None = None,
    many: bool = False,
    section: str | None = None,
) -> Any:
    """Declare a field of a settings class.

    Args:
        default: value if not given; a list is copied. Without one the field is required.
        help: one line for ``--help``, which also shows the default and the choices.
        choices: the only values allowed; of a list, of its items.
        least: smallest value allowed, of a list of its items.
        most: largest value allowed; infinity and NaN never are.
        below: smallest value not allowed.
        flag: on the command line, instead of ``--name`` (or ``--name/--no-name`` of a bool);
            several are separated by commas.
        positional: an argument of the command line instead of an option.
        metavar: placeholder in ``--help``.
        many: on the command line this list takes every value up to the next option, so that a
            shell's ``--input *.txt`` works.
        section: heading in ``--help-all`` of this field and those behind it. The fields before
            the first one are what ``--help`` explains.
    """
    about = {
        "help": help,
        "choices": tuple(choices),
        "least": least,
        "most": most,
        "below": below,
        "flag": flag,
        "positional": positional,
        "metavar": metavar,
        "many": many,
        "section": section,
    }
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass(kw_only=True)
class Settings:
    """Base of the settings classes: values are coerced to the type of their field and checked.

    Raises:
        UserError: a value is of another kind, not among the choices, or out of range.
    """

    CONFIGS: ClassVar[Path | None] = None
    """Folder of configurations (``NAME.yaml``) that come with METRO."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for part in fields(self):
            value = coerced(part.name, getattr(self, part.name), kinds[part.name])
            setattr(self, part.name, value)
            _check(part, value)
        self.check()

    def check(self) -> None:
        """Check what concerns several fields; for subclasses."""

    def as_dict(self) -> dict[str, Any]:
        """All values, as YAML and JSON take them (paths as text)."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def names(cls) -> list[str]:
        """Names of all fields."""
        return [part.name for part in fields(cls)]

    @classmethod
    def of(cls, given: "Self | None" = None, /, **options: Any) -> Self:
        """Settings from a Python call: an object as it is, or changed by ``options``."""
        values = {name: getattr(given, name) for name in cls.names()} if given else {}
        return cls._made({**values, **cls.by_name(options, "the arguments")})

    @classmethod
    def combine(cls, config: str | Path | None, given: Mapping[str, Any]) -> Self:
        """Options from a file, overridden by those ``given`` (None: not given)."""
        options = cls.read(config) if config else {}
        given = {name: value for name, value in given.items() if value is not None}
        return cls._made(options | cls.by_name(given, "the command line"))

    @classmethod
    def read(cls, config: str | Path) -> dict[str, Any]:
        """Options from a YAML file, or from a configuration that comes with METRO, by its name.

        Raises:
            UserError: there is no such file, it is not a mapping, or a key is not an option.
        """
        path = cls.find_config(config)
        content = read_yaml(path)
        if not isinstance(content, dict):
            example = cls.names()[0]
            raise UserError(f"{path} holds no options; write lines such as `{example}: VALUE`")
        return cls.by_name(content, str(path))

    @classmethod
    def shipped(cls) -> dict[str, Path]:
        """The configurations that come with METRO: name -> file."""
        found = sorted(cls.CONFIGS.glob("*.yaml")) if cls.CONFIGS else []
        return {path.stem: path for path in found}

    @classmethod
    def find_config(cls, config: str | Path) -> Path:
        """Find a file, or a configuration that comes with METRO, by its name."""
        shipped = cls.shipped()
        if Path(config).is_file():
            return Path(config)
        if str(config) not in shipped:
            known = f", nor a configuration of that name; METRO has {', '.join(shipped)}"
            raise UserError(f"there is no file {config}{known if shipped else ''}")
        return shipped[str(config)]

    @classmethod
    def _made(cls, options: dict[str, Any]) -> Self:
        missing = [
            flag_of(part)
            for part in fields(cls)
            if part.default is MISSING and part.default_factory is MISSING
            if options.get(part.name) is None
        ]
        if missing:
            raise UserError(f"missing: {', '.join(missing)}; give them as options or in a file")
        return cls(**options)

    @classmethod
    def by_name(cls, options: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """Replace the flags' spellings (``workers``, ``batch-size``) by the fields' names."""
        names = {name: name for name in cls.names()}
        for part in fields(cls):
            if not part.metadata["positional"]:
                for flag in (part.metadata["flag"] or flag_of(part)).split("/")[0].split(","):
                    names.setdefault(flag.removeprefix("--").replace("-", "_"), part.name)
        found: dict[str, Any] = {}
        for key, value in options.items():
            name = names.get(str(key).replace("-", "_"))
            if name is None:
                raise UserError(f"{where}: unknown option {key!r}; {did_you_mean(str(key), names)}")
            if name in found:
                raise UserError(f"{where}: {key} and {name} are one option; give it once")
            found[name] = value
        return found


def flag_of(part: Field) -> str:
    """Option of a field, ``--learning-rate`` of ``learning_rate``; placeholder of an argument."""
    if part.metadata["positional"]:
        return part.metadata["metavar"] or part.name.upper()
    flags = part.metadata["flag"] or "--" + part.name.replace("_", "-")
    return flags.split(",")[0].split("/")[0]


def split_kind(kind: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into (X, True); other types give (X, False)."""
    if get_origin(kind) in (Union, UnionType):
        [only] = [each for each in get_args(kind) if each is not type(None)]
        return only, True
    return kind, False


def coerced(name: str, value: Any, kind: Any) -> Any:
    """Coerce ``value`` to the type of its field (YAML parses ``5e-5`` as a string).

    Raises:
        UserError: it is of another kind.
    """
    kind, may_be_none = split_kind(kind)
    if value is None:
        if may_be_none:
            return None
        raise UserError(f"{name} is empty; give a value or leave it out")
    number = kind in (int, float) and not isinstance(value, bool)  # YAML's `yes` is not 1
    try:
        if get_origin(kind) is list and not isinstance(value, dict):
            items = [value] if isinstance(value, str | Path) else list(value)
            return [coerced(name, item, get_args(kind)[0]) for item in items]
        if kind is float and number:
            return float(value)
        if kind is int and number and float(value) == int(float(value)):
            return int(float(value))
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (str, Path) and isinstance(value, str | Path):
            return kind(str(value))
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError):
        pass
    word = getattr(kind, "__name__", str(kind))
    hint = (
        ", in YAML in quotes" if kind in (str, Path) and not isinstance(value, list | dict) else ""
    )
    raise UserError(f"{name} is {value!r}; it must be of type {word}{hint}")


def _check(part: Field, value: Any) -> None:
    names = ("choices", "least", "most", "below")
    choices, least, most, below = (part.metadata[name] for name in names)
    if value is None:
        return
    for each in value if isinstance(value, list) else [value]:
        if choices and each not in choices:
            raise UserError(f"{part.name} is {each!r}; use one of {', '.join(choices)}")
        if isinstance(each, float) and not math.isfinite(each):
            raise UserError(f"{part.name} is {each}; use a finite number")
        if least is not None and each < least:
            raise UserError(f"{part.name} is {each}; use {least} or more")
        if most is not None and each > most:
            raise UserError(f"{part.name} is {each}; use at most {most}")
        if below is not None and each >= below:
            raise UserError(f"{part.name} is {each}; use {least} up to less than {below}")
