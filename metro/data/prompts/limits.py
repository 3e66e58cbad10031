"""Limits of the cost of rendering a prompt template, and the operations that keep to them.

Every operation whose result can be larger than what it was given (joining, repeating, replacing,
counting) checks the size before it computes. ``charge`` adds up the work of a rendering.
"""

import json
import random
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, Literal

from metro.utils.messages import UserError

MAX_SOURCE_CHARS = 100_000
MAX_DEPTH = 100
"""Nesting of expressions and tags."""
MAX_TEXT_CHARS = 1_000_000
"""Of any single value that a template makes."""
MAX_LIST_ITEMS = 100_000
MAX_INTEGER_BITS = 64
"""Larger ones allow hash-collision attacks on dicts and sets."""
MAX_WORK = 20_000_000
"""Characters made, plus nodes run in loops, in one rendering."""
MAX_SECONDS = 10.0
"""Of computing time, so that a busy machine changes no result. Last resort; checked at loop steps
and calls."""
_WORK_BETWEEN_LOOKS = 20_000

# filters that no template can name
LOOP, CONCAT, WEIGH, PRINT = "\0loop", "\0concat", "\0weigh", "\0print"
CUT_CHARS, _CUT_LEEWAY = 2048, 5  # of Jinja's truncate, which spares a text a bit too long
_MAX_WIDTH = 100  # of a number that `format` writes
_FORMAT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d+)?(?:\.(\*|\d+)?)?")


class TemplateError(UserError):
    """A template fails on a row, or asks for what no template may: time, memory, attributes.

    Attributes:
        problem: the failure, as the predicate of a sentence about the template.
        reason: the kind of failure; equal ones are counted together.
        template: dataset and name of the template, if known.
    """

    def __init__(
        self,
        problem: str,
        reason: str = "rendering failed",
        template: tuple[str, str] | None = None,
    ):
        dataset, name = template or ("", "")
        super().__init__(f"template {name!r} of {dataset} {problem}" if template else problem)
        self.problem, self.reason, self.template = problem, reason, template


class _Rendering(threading.local):
    """State of the rendering that runs now in this thread."""

    def start(self, seed: int | None, cuts: bool = False) -> None:
        self.seed, self.cuts = seed, cuts
        self.is_answer = False  # `|||` has been rendered
        self.is_cut = False  # a printed value was longer than CUT_CHARS
        self.generator: random.Random | None = None
        self.work, self.next_look = 0, _WORK_BETWEEN_LOOKS
        self.deadline = time.thread_time() + MAX_SECONDS
        self.missing: list[str] = []
        self.unlabelled: list[str] = []
        self.used_choices: list[int] = []

    def charge(self, amount: int) -> None:
        self.work = work = self.work + amount
        if work > self.next_look:
            self.next_look = work + _WORK_BETWEEN_LOOKS
            if work > MAX_WORK:
                raise TemplateError(f"does more than {MAX_WORK:,} units of work in one rendering")
            if time.thread_time() > self.deadline:
                raise TemplateError(f"takes longer than {MAX_SECONDS:g} seconds to render")

    def draw(self, items: list) -> Any:
        if self.seed is None:
            return items[0]
        if self.generator is None:
            self.generator = random.Random(self.seed)
        return items[self.generator.randrange(len(items))]


now = _Rendering()
now.start(None)


def weigh(value: Any) -> int:
    """Return about the number of characters of ``value`` as text; refuse what exceeds any text.

    Lists that hold each other many times over have few objects and endless text, so the count
    stops at the bound instead of walking on.
    """
    if isinstance(value, str):
        total = len(value)
    elif isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateError(f"makes a number of more than {MAX_INTEGER_BITS} bits")
        total = 20
    elif isinstance(value, complex):
        raise TemplateError("makes a complex number")
    elif isinstance(value, range):
        total = len(value)
    elif isinstance(value, (list, tuple, dict, set, KeysView, ValuesView, ItemsView)):
        total = 0
        stack: list[Iterator[Any]] = [iter([value])]
        while stack:
            for item in stack[-1]:
                total += 2
                if isinstance(item, str):
                    total += len(item)
                elif isinstance(item, dict):
                    stack.append(iter(item.values()))
                    stack.append(iter(item.keys()))
                    break
                elif isinstance(item, (list, tuple, set, KeysView, ValuesView, ItemsView)):
                    stack.append(iter(item))
                    break
                if total > MAX_TEXT_CHARS:
                    break
            else:
                stack.pop()
            if total > MAX_TEXT_CHARS or len(stack) > 2 * MAX_DEPTH:
                total = MAX_TEXT_CHARS + 1
                break
    else:
        total = 20
    if total > MAX_TEXT_CHARS:
        raise TemplateError(f"makes a value of more than {MAX_TEXT_CHARS:,} characters")
    return total


def is_null(value: Any) -> bool:
    """Tell null, and NaN, which tables hold where a value is missing."""
    return value is None or (isinstance(value, float) and value != value)


def as_text(value: Any, name: str = "value (it is null)") -> str:
    """Return a value as text; note by its name one that is null, which is no text."""
    if not isinstance(value, str):
        weigh(value)
        if is_null(value):
            now.missing.append(name)
        if isinstance(value, bytes):
            raise TemplateError("prints bytes, which are no text", "bytes instead of a text")
        value = str(value)
    if len(value) > MAX_TEXT_CHARS:
        raise TemplateError(f"makes a text of more than {MAX_TEXT_CHARS:,} characters")
    return value


def as_list(value: Any) -> list:
    items = []
    for item in value:
        items.append(item)
        if len(items) > MAX_LIST_ITEMS:
            raise TemplateError(f"makes a list of more than {MAX_LIST_ITEMS:,} entries")
    now.charge(len(items))
    return items


def join_texts(separator: str, items) -> str:
    texts = [as_text(item) for item in as_list(items)]
    total = sum(map(len, texts)) + len(separator) * max(0, len(texts) - 1)
    if total > MAX_TEXT_CHARS:
        raise TemplateError(f"joins more than {MAX_TEXT_CHARS:,} characters")
    now.charge(total)
    return separator.join(texts)


def replace_text(text: str, old: str, new: str, count: int | None = None) -> str:
    if not all(isinstance(part, str) for part in (text, old, new)):
        raise TypeError("replace needs texts")
    times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    total = len(text) + times * len(new)
    if total > MAX_TEXT_CHARS:
        raise TemplateError(f"replaces into more than {MAX_TEXT_CHARS:,} characters")
    now.charge(total)
    return text.replace(old, new, -1 if count is None else count)


def bounded_range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MAX_LIST_ITEMS:
        raise TemplateError(f"counts a range of more than {MAX_LIST_ITEMS:,}")
    return made


def bounded_zip(*lists):
    for items in zip(*lists):  # noqa: B905, stops at the shortest, as templates expect
        now.charge(weigh(items))
        yield items


def product_charge(text: str, *parts) -> None:
    """Charge stripping and searching from the right: text length times lengths of ``parts``."""
    now.charge(len(text) * sum(len(part) for part in parts if isinstance(part, str)))


def _metered_loop(items, size: int):
    for item in items:
        now.charge(1 + size)
        yield item


def _weighed(value) -> Any:
    now.charge(weigh(value))
    return value


def _choice(items) -> Any:
    items = as_list(items)
    if not items:
        raise ValueError("the filter `choice` draws from an empty list")
    return now.draw(items)


def _most_frequent(items) -> list | None:
    from collections import Counter

    counts = Counter(as_list(items)).most_common()
    return [item for item, count in counts if count == counts[0][1]] if counts else None


def _summed(numbers) -> Any:
    numbers = as_list(numbers)
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError("sum needs numbers")
    return sum(numbers)


def _as_number(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter of a function of Jinja's that takes 0 for what is no number."""

    def call(value: Any, default: Any = None, *args: Any) -> Any:
        if default is not None:
            return convert(value, default, *args)
        if is_null(value) or (isinstance(value, str) and not value.strip()):
            if not now.unlabelled:  # else this value is a label that is hidden
                now.missing.append(f"number (it is {value!r})")
        elif isinstance(value, str) and convert(value, None, *args) is None:
            raise ValueError(f"{value!r} is not a number")
        return convert(value, 0, *args)

    return call


def _trimmed(value, chars=None) -> str:
    text = as_text(value)
    product_charge(text, chars)
    return text.strip(chars)


def _rounded(
    value, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common"
) -> float:
    from jinja2.filters import do_round

    return do_round(value, max(-20, min(20, int(precision))), method)


def _formatted(pattern, *args, **kwargs) -> str:
    """Write numbers and texts as C's printf does: ``"%.1f" | format(score)``."""
    pattern = as_text(pattern)
    for sizes in _FORMAT.findall(pattern):
        if any(size == "*" or len(size) > 3 or int(size or 0) > _MAX_WIDTH for size in sizes):
            raise TemplateError(f"formats to a width of more than {_MAX_WIDTH}")
    if kwargs:
        return pattern % kwargs
    return pattern % tuple(as_text(value) if is_null(value) else value for value in args)


def _comparing(function):
    """Meter a sorting filter, which compares: its arguments count several times."""

    def call(context, value, *args, **kwargs):
        value = list(value.items()) if isinstance(value, dict) else as_list(value)
        now.charge(20 * weigh(value))
        return function(context.environment, value, *args, **kwargs)

    return call


def make_filters() -> dict:
    """Return the filters of templates, as functions of the context: none runs while compiling.

    ``truncate`` and similar ones are Jinja's own; those that multiply lengths are ours.
    """
    from jinja2 import filters as jinja
    from jinja2 import pass_context

    def simple(function):
        def call(context, value, *args, **kwargs):
            result = function(value, *args, **kwargs)
            now.charge(weigh(result))
            return result

        return pass_context(call)

    def with_environment(function):
        def call(context, value, *args, **kwargs):
            result = function(context.environment, value, *args, **kwargs)
            now.charge(1 if hasattr(result, "__next__") else weigh(result))
            return result

        return pass_context(call)

    def with_context(function):
        def call(context, value, *args, **kwargs):
            return function(context, as_list(value), *args, **kwargs)

        return pass_context(call)

    def join(value, d="", attribute=None):
        assert attribute is None
        return join_texts(as_text(d), value)

    found = {
        name: simple(function)
        for name, function in {
            "abs": abs,
            "capitalize": lambda value: as_text(value).capitalize(),
            "choice": _choice,
            "count": len,
            "d": jinja.do_default,
            "default": jinja.do_default,
            "float": _as_number(jinja.do_float),
            "format": _formatted,
            "int": _as_number(jinja.do_int),
            "items": lambda value: list(value.items()),
            "join": join,
            "last": lambda value: as_list(value)[-1] if value else None,
            "length": len,
            "list": as_list,
            "lower": lambda value: as_text(value).lower(),
            "most_frequent": _most_frequent,
            "random": _choice,
            "replace": lambda value, old, new, count=None: replace_text(
                as_text(value), as_text(old), as_text(new), count
            ),
            "reverse": lambda value: (
                value[::-1] if isinstance(value, str) else as_list(value)[::-1]
            ),
            "round": _rounded,
            "string": as_text,
            "sum": _summed,
            "title": lambda value: jinja.do_title(as_text(value)),
            "tojson": lambda value: (weigh(value), json.dumps(value))[1],
            "trim": _trimmed,
            "upper": lambda value: as_text(value).upper(),
            "wordcount": lambda value: len(as_text(value).split()),
        }.items()
    }
    found["first"] = with_environment(jinja.sync_do_first)
    found["truncate"] = with_environment(
        lambda environment, value, *args, **kwargs: jinja.do_truncate(
            environment, as_text(value), *args, **kwargs
        )
    )
    for name in ("map", "select", "reject", "selectattr", "rejectattr"):
        found[name] = with_context(getattr(jinja, f"sync_do_{name}"))
    for name in ("sort", "min", "max", "unique"):
        found[name] = pass_context(_comparing(getattr(jinja, f"do_{name}")))

    def printed(context, value, name):
        text = as_text(value, name)
        if now.cuts and len(text) > CUT_CHARS + _CUT_LEEWAY:
            text = jinja.do_truncate(context.environment, text, CUT_CHARS)
            now.is_cut = True
        now.charge(len(text))
        return text

    found[PRINT] = pass_context(printed)
    found[LOOP] = pass_context(lambda context, value, size: _metered_loop(value, size))
    found[CONCAT] = pass_context(lambda context, values: join_texts("", values))
    found[WEIGH] = pass_context(lambda context, value: _weighed(value))
    return found
