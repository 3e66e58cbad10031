"""Renders Jinja text of strangers: prompt templates run in a sandbox with bounded time and memory.

A template is data that somebody wrote: it may read the row that it is given and nothing else. So
only the parts of Jinja that prompt templates need are there (a list of what is allowed, not of
what is forbidden), and everything whose cost a template could choose is metered: characters made,
loop steps, sizes of single values, seconds. What exceeds a bound raises ``TemplateRefused``.

The helpers are promptsource's: filters ``choice`` and ``most_frequent``, function ``zip``. Draws of
``choice`` come from the seed of the rendering, never from a global generator.
"""

import random
import threading
import time
from functools import lru_cache
from typing import Any

MAX_SOURCE_CHARS = 100_000
MAX_DEPTH = 100
"""Nesting of expressions and tags."""
MAX_TEXT_CHARS = 1_000_000
"""Of any single value that a template makes."""
MAX_LIST_ITEMS = 100_000
MAX_INTEGER_BITS = 4096
MAX_WORK = 20_000_000
"""Characters made, plus nodes run in loops, in one rendering."""
MAX_SECONDS = 10.0
"""Last resort; checked at loop steps and calls."""

_METHODS = frozenset(
    "capitalize casefold count endswith find get index isalnum isalpha isdigit islower isspace "
    "istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace "
    "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
    "values".split()
)
_FUNCTIONS = frozenset({"range", "zip", "namespace"})
_TAGS = "If For Assign AssignBlock Output With ScopedEvalContextModifier".split()
_EXPRESSIONS = (
    "TemplateData Const Name NSRef List Tuple Dict Pair Keyword Slice Getattr Getitem Call Filter "
    "Test Concat Compare Operand CondExpr And Or Not Add Sub Mul Div FloorDiv Mod Pow Neg Pos"
).split()
_PIPE, _PIPE_STAND_IN = "|||", "\ue000\ue001\ue000"
_LOOP, _CONCAT = "\0loop", "\0concat"  # filters that no template can name


class TemplateRefused(ValueError):
    """The template asks for what no template may: another attribute, too much time or memory."""


class MissingAnswer(ValueError):
    """``answer_choices`` has no such entry."""


class _Rendering(threading.local):
    """What belongs to the rendering that runs now, in this thread."""

    def start(self, seed: int | None) -> None:
        self.seed, self.generator = seed, None
        self.work, self.deadline = 0, time.monotonic() + MAX_SECONDS
        self.missing: list[str] = []
        self.used_choices: list[int] = []

    def charge(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_WORK:
            raise TemplateRefused(f"does more than {MAX_WORK:,} units of work in one rendering")
        if time.monotonic() > self.deadline:
            raise TemplateRefused(f"takes longer than {MAX_SECONDS:g} seconds for one rendering")

    def draw(self, items: list) -> Any:
        if self.seed is None:
            return items[0]
        if self.generator is None:
            self.generator = random.Random(self.seed)
        return items[self.generator.randrange(len(items))]


_now = _Rendering()
_now.start(None)


class AnswerChoices(list):
    """The options as a template sees them: an index beyond either end is an error, not a guess."""

    def __getitem__(self, index):
        if isinstance(index, int) and not isinstance(index, bool):
            if not 0 <= index < len(self):
                raise MissingAnswer(f"answer_choices has {len(self)} entries and none at {index}")
            _now.used_choices.append(index)
        return super().__getitem__(index)


def weigh(value: Any) -> int:
    """Characters of ``value`` as text, about; refuses what is larger than any text may be.

    Lists that hold each other many times over have few objects and endless text, so the count
    stops at the bound instead of walking on.
    """
    if isinstance(value, str):
        total = len(value)
    elif isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateRefused(f"makes a number of more than {MAX_INTEGER_BITS} bits")
        total = 20
    elif isinstance(value, (list, tuple, dict, set)):
        total, stack = 0, [iter([value])]
        while stack:
            for item in stack[-1]:
                total += 2
                if isinstance(item, str):
                    total += len(item)
                elif isinstance(item, dict):
                    stack.append(iter(item.values()))
                    stack.append(iter(item.keys()))
                    break
                elif isinstance(item, (list, tuple, set)):
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
        raise TemplateRefused(f"makes a value of more than {MAX_TEXT_CHARS:,} characters")
    return total


def _text(value: Any) -> str:
    if not isinstance(value, str):
        weigh(value)
        value = str(value)
    if len(value) > MAX_TEXT_CHARS:
        raise TemplateRefused(f"makes a text of more than {MAX_TEXT_CHARS:,} characters")
    return value


def _listed(value: Any) -> list:
    items = []
    for item in value:
        items.append(item)
        if len(items) > MAX_LIST_ITEMS:
            raise TemplateRefused(f"makes a list of more than {MAX_LIST_ITEMS:,} entries")
    _now.charge(len(items))
    return items


def _joined(separator: str, items) -> str:
    texts = [_text(item) for item in _listed(items)]
    total = sum(map(len, texts)) + len(separator) * max(0, len(texts) - 1)
    if total > MAX_TEXT_CHARS:
        raise TemplateRefused(f"joins more than {MAX_TEXT_CHARS:,} characters")
    _now.charge(total)
    return separator.join(texts)


def _replaced(text: str, old: str, new: str, count: int | None = None) -> str:
    if not all(isinstance(part, str) for part in (text, old, new)):
        raise TypeError("replace needs texts")
    times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    total = len(text) + times * len(new)
    if total > MAX_TEXT_CHARS:
        raise TemplateRefused(f"replaces into more than {MAX_TEXT_CHARS:,} characters")
    _now.charge(total)
    return text.replace(old, new, -1 if count is None else count)


def _bounded_range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MAX_LIST_ITEMS:
        raise TemplateRefused(f"counts a range of more than {MAX_LIST_ITEMS:,}")
    return made


def _metered_loop(items, num_nodes: int):
    for item in items:
        _now.charge(1 + num_nodes)
        yield item


def _choice(items) -> Any:
    items = _listed(items)
    if not items:
        raise ValueError("the filter `choice` draws from an empty list")
    return _now.draw(items)


def _most_frequent(items) -> list | None:
    from collections import Counter

    counts = Counter(_listed(items)).most_common()
    return [item for item, count in counts if count == counts[0][1]] if counts else None


def _summed(numbers) -> Any:
    numbers = _listed(numbers)
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError("sum needs numbers")
    return sum(numbers)


def _rounded(value, precision: int = 0, method: str = "common") -> float:
    from jinja2.filters import do_round

    return do_round(value, max(-20, min(20, int(precision))), method)


def _sorted(default):
    """Sorting compares, so what it sorts counts several times."""

    def call(context, value, *args, **kwargs):
        value = list(value.items()) if isinstance(value, dict) else _listed(value)
        _now.charge(20 * weigh(value))
        if default is not None:
            return default(context.environment, value, *args, **kwargs)
        return sorted(value)

    return call


def _filters() -> dict:
    """What templates may call, all as functions of the context so that none runs while compiling.

    ``truncate`` and its like are Jinja's own; what multiplies lengths is ours.
    """
    from jinja2 import filters as jinja
    from jinja2 import pass_context

    def simple(function, listed=False):
        def call(context, value, *args, **kwargs):
            result = function(_listed(value) if listed else value, *args, **kwargs)
            _now.charge(weigh(result))
            return result

        return pass_context(call)

    def with_environment(function):
        def call(context, value, *args, **kwargs):
            result = function(context.environment, value, *args, **kwargs)
            _now.charge(1 if hasattr(result, "__next__") else weigh(result))
            return result

        return pass_context(call)

    def with_context(function):
        def call(context, value, *args, **kwargs):
            return function(context, _listed(value), *args, **kwargs)

        return pass_context(call)

    def join(value, d="", attribute=None):
        assert attribute is None
        return _joined(_text(d), value)

    def length(value):
        return len(value)

    found = {
        name: simple(function)
        for name, function in {
            "abs": abs,
            "capitalize": jinja.do_capitalize,
            "choice": _choice,
            "count": length,
            "d": jinja.do_default,
            "default": jinja.do_default,
            "float": jinja.do_float,
            "int": jinja.do_int,
            "items": lambda value: list(value.items()),
            "join": join,
            "last": lambda value: _listed(value)[-1] if value else None,
            "length": length,
            "list": lambda value: _listed(value),
            "lower": lambda value: _text(value).lower(),
            "most_frequent": _most_frequent,
            "random": _choice,
            "replace": lambda value, old, new, count=None: _replaced(
                _text(value), _text(old), _text(new), count
            ),
            "reverse": lambda value: (
                value[::-1] if isinstance(value, str) else _listed(value)[::-1]
            ),
            "round": _rounded,
            "string": _text,
            "sum": _summed,
            "title": lambda value: jinja.do_title(_text(value)),
            "trim": lambda value, chars=None: _text(value).strip(chars),
            "upper": lambda value: _text(value).upper(),
        }.items()
    }
    found["wordcount"] = simple(lambda value: len(_text(value).split()))
    found["tojson"] = simple(lambda value: (weigh(value), __import__("json").dumps(value))[1])
    found["first"] = with_environment(jinja.sync_do_first)
    found["truncate"] = with_environment(
        lambda environment, value, *args, **kwargs: jinja.do_truncate(
            environment, _text(value), *args, **kwargs
        )
    )
    for name in ("map", "select", "reject", "selectattr", "rejectattr"):
        found[name] = with_context(getattr(jinja, f"sync_do_{name}"))
    sorts = {
        "sort": jinja.do_sort,
        "min": jinja.do_min,
        "max": jinja.do_max,
        "unique": jinja.do_unique,
    }
    for name, function in sorts.items():
        found[name] = pass_context(_sorted(function))
    found[_LOOP] = pass_context(lambda context, value, size: _metered_loop(value, size))
    found[_CONCAT] = pass_context(lambda context, values: _joined("", values))
    return found


def _check_and_meter(tree, source_name: str):
    """Refuse what is not allowed; route loops and concatenations through the meter."""
    from jinja2 import nodes

    allowed = tuple(getattr(nodes, name) for name in [*_TAGS, *_EXPRESSIONS, "Template"])

    def visit(node, depth: int) -> int:
        """Number of nodes below and with this one."""
        if depth > MAX_DEPTH:
            raise TemplateRefused(f"nests deeper than {MAX_DEPTH}")
        kind = type(node).__name__
        if not isinstance(node, allowed) or (isinstance(node, nodes.For) and node.recursive):
            raise TemplateRefused(f"uses `{kind.lower()}`, which prompt templates may not")
        if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            raise TemplateRefused(f"reads the attribute {node.attr!r}")
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            if isinstance(node.arg.value, str) and node.arg.value.startswith("__"):
                raise TemplateRefused(f"reads the attribute {node.arg.value!r}")
        if isinstance(node, nodes.Call):
            name = getattr(node.node, "attr", None) or getattr(node.node, "name", None)
            known = _METHODS if isinstance(node.node, nodes.Getattr) else _FUNCTIONS
            if not isinstance(node.node, (nodes.Getattr, nodes.Name)) or name not in known:
                raise TemplateRefused(f"calls `{name or kind}`, which prompt templates may not")
        if (
            isinstance(node, nodes.Filter)
            and node.name == "join"
            and (len(node.args) > 1 or any(pair.key == "attribute" for pair in node.kwargs))
        ):
            raise TemplateRefused("uses `join` with an attribute: write map(attribute=...) first")
        size = 1 + sum(visit(child, depth + 1) for child in node.iter_child_nodes())
        if isinstance(node, nodes.For):
            node.iter = _as_filter(nodes, node.iter, _LOOP, [nodes.Const(size)])
        for field, value in list(node.iter_fields()):
            if isinstance(value, nodes.Concat):
                setattr(node, field, _as_concat(nodes, value))
            elif isinstance(value, list):
                value[:] = [
                    _as_concat(nodes, item) if isinstance(item, nodes.Concat) else item
                    for item in value
                ]
        return size

    visit(tree, 0)
    return tree


def _as_filter(nodes, value, name: str, args: list):
    return nodes.Filter(
        value, name, args, [], None, None, lineno=value.lineno, environment=value.environment
    )


def _as_concat(nodes, concat):
    values = nodes.List(concat.nodes, lineno=concat.lineno, environment=concat.environment)
    return _as_filter(nodes, values, _CONCAT, [])


@lru_cache(maxsize=1)
def _environment():
    from jinja2 import Undefined, pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Missing(Undefined):
        """An absent field renders as nothing, as usual, and is noted."""

        __slots__ = ()

        def _note(self):
            if self._undefined_name and isinstance(self._undefined_name, str):
                _now.missing.append(self._undefined_name)

        def __str__(self):
            self._note()
            return ""

        def __iter__(self):
            self._note()
            return iter(())

        def __len__(self):
            self._note()
            return 0

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

        def _parse(self, source, name, filename):
            return _check_and_meter(super()._parse(source, name, filename), name or "template")

        def call_binop(self, context, operator, left, right):
            _check_operation(operator, left, right)
            result = super().call_binop(context, operator, left, right)
            _now.charge(weigh(result))
            return result

        def call(__self, __context, __function, *args, **kwargs):  # noqa: N805, names as Jinja's
            kwargs.pop("_loop_vars", None)  # Jinja's own, inside of loops
            kwargs.pop("_block_vars", None)
            if __function is _bounded_range or __function is zip or __function is _namespace:
                return __function(*args, **kwargs)
            owner = getattr(__function, "__self__", None)
            name = getattr(__function, "__name__", None)
            if not isinstance(owner, (str, list, tuple, dict)) or name not in _METHODS:
                raise TemplateRefused(f"calls `{name}`, which prompt templates may not")
            _now.charge(1 + len(owner))
            if name == "join":
                return _joined(owner, *args, **kwargs)
            if name == "replace":
                return _replaced(owner, *args, **kwargs)
            result = __function(*args, **kwargs)
            if isinstance(result, (str, list, tuple)):
                _now.charge(weigh(result))
            return result

    environment = Environment(undefined=Missing, optimized=False, cache_size=0)
    environment.filters.clear()
    environment.filters.update(_filters())
    from jinja2.utils import Namespace as _namespace

    environment.globals.clear()
    environment.globals.update(range=_bounded_range, zip=zip, namespace=_namespace)

    @pass_context
    def finalize(context, value):
        text = _text(value)
        _now.charge(len(text))
        return text

    environment.finalize = finalize
    return environment


def _check_operation(operator: str, left, right) -> None:
    sized = (str, list, tuple)
    if operator == "%" and isinstance(left, str):
        raise TemplateRefused("formats with `%`, which prompt templates may not")
    if operator == "*" and (isinstance(left, sized) or isinstance(right, sized)):
        value, times = (left, right) if isinstance(left, sized) else (right, left)
        if isinstance(times, int) and times > 0:
            bound = MAX_TEXT_CHARS if isinstance(value, str) else MAX_LIST_ITEMS
            if len(value) * times > bound:
                raise TemplateRefused(f"repeats to more than {bound:,}")
    elif operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) + len(right) > MAX_LIST_ITEMS:
            raise TemplateRefused(f"makes a list of more than {MAX_LIST_ITEMS:,} entries")
    elif isinstance(left, int) and isinstance(right, int):
        bits = abs(left).bit_length() * max(1, right) if operator == "**" else 0
        if bits > MAX_INTEGER_BITS:
            raise TemplateRefused(f"makes a number of more than {MAX_INTEGER_BITS} bits")


@lru_cache(maxsize=8192)
def compile_source(source: str):
    """The compiled template; once per text.

    Raises:
        TemplateRefused: it uses what templates may not, or is no template.
    """
    from jinja2 import TemplateError

    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateRefused(f"is longer than {MAX_SOURCE_CHARS:,} characters")
    try:
        return _environment().from_string(source)
    except TemplateRefused:
        raise
    except (TemplateError, SyntaxError) as error:
        raise TemplateRefused(f"is no template: {error}") from None
    except (RecursionError, MemoryError, OverflowError, ValueError) as error:
        raise TemplateRefused(f"is no template: {type(error).__name__}: {error}") from None


def protect(value: Any) -> Any:
    """``value`` with every ``|||`` in its texts made invisible to the split of prompt and answer.

    The value itself is returned where there is none, which is nearly always.
    """
    if isinstance(value, str):
        return value.replace(_PIPE, _PIPE_STAND_IN) if _PIPE in value else value
    if isinstance(value, dict):
        changed = {key: protect(item) for key, item in value.items()}
        return changed if any(changed[key] is not value[key] for key in value) else value
    if isinstance(value, (list, tuple)):
        items = [protect(item) for item in value]
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def unprotect(text: str) -> str:
    return text.replace(_PIPE_STAND_IN, _PIPE) if _PIPE_STAND_IN in text else text


class RenderedSource:
    """Text of one rendering (still protected), and what happened meanwhile."""

    __slots__ = ("text", "missing", "used_choices")

    def __init__(self, text: str, missing: list[str], used_choices: list[int]):
        self.text, self.missing, self.used_choices = text, missing, used_choices


def render_source(source: str, values: dict, seed: int | None) -> RenderedSource:
    """Render Jinja text with the (protected) fields of ``values``.

    Args:
        seed: of the filter ``choice``; None takes the first item of every list.

    Raises:
        TemplateRefused: the template exceeds a bound.
        MissingAnswer: it asks for an answer choice that is not there.
        ValueError: it fails on this row; the message says how.
    """
    template = compile_source(source)
    from jinja2 import TemplateError
    from jinja2.sandbox import SecurityError

    _now.start(seed)
    try:
        text = template.render(values)
    except (TemplateRefused, MissingAnswer):
        raise
    except SecurityError as error:
        raise TemplateRefused(f"reaches outside its row: {error}") from None
    except (RecursionError, MemoryError) as error:
        raise TemplateRefused(f"needs too much memory: {type(error).__name__}") from None
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"fails on this row: {type(error).__name__}: {error}") from None
    except ValueError as error:
        raise ValueError(f"fails on this row: {error}") from None
    return RenderedSource(text, _now.missing, _now.used_choices)
