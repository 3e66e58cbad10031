"""Sandbox for untrusted prompt templates: Jinja with bounded time and memory.

A template may read the row that it is given and nothing else. So only the parts of Jinja that
prompt templates need are available (an allow list), and everything whose cost a template could
choose is metered: characters made, loop steps, sizes of single values, seconds. What exceeds a
bound raises ``TemplateError``.

The helpers are promptsource's: filters ``choice`` and ``most_frequent``, function ``zip``. Draws of
``choice`` come from the seed of the rendering, never from a global generator.
"""

import copy
import re
from functools import lru_cache
from typing import Any

from metro.data.prompts.labels import DECIDES, mark_deciding_values, note_deciding_value, spelling
from metro.data.prompts.limits import (
    CONCAT,
    LOOP,
    MAX_DEPTH,
    MAX_INTEGER_BITS,
    MAX_LIST_ITEMS,
    MAX_SOURCE_CHARS,
    MAX_TEXT_CHARS,
    PRINT,
    WEIGH,
    TemplateError,
    bounded_range,
    bounded_zip,
    join_texts,
    make_filters,
    now,
    product_charge,
    replace_text,
    weigh,
)

_METHODS = frozenset(
    "capitalize casefold count endswith find get index isalnum isalpha isdigit islower isspace "
    "istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace "
    "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
    "values".split()
)
_CHANGES = frozenset({"append", "extend", "pop", "update"})
"""Methods that change a list or dict: templates that call one get a row of their own."""
_PRODUCTS = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"})
"""Methods whose time may be the product of two lengths."""
_FUNCTIONS = frozenset({"range", "zip", "namespace"})
_TAGS = "If For Assign AssignBlock Output With".split()
_EXPRESSIONS = (
    "TemplateData Const Name NSRef List Tuple Dict Pair Keyword Slice Getattr Getitem Call Filter "
    "Test Concat Compare Operand CondExpr And Or Not Add Sub Mul Div FloorDiv Mod Pow Neg Pos"
).split()
_CHANGE = re.compile(r"\.\s*(?:" + "|".join(sorted(_CHANGES)) + r")\b")
_RAW = re.compile(r"\{%[-+]?\s*raw\b")
_PIPE, _PIPE_STAND_IN = "|||", "\uf8f0\uf8f1\uf8f0"


def _check_and_meter(tree):
    """Refuse what is not allowed; route through the meter what makes, compares or repeats values.

    Whatever a template makes is weighed when it is made, so that no later step (comparing, hashing,
    printing) meets lists that hold each other endlessly.
    """
    from jinja2 import nodes

    allowed = tuple(getattr(nodes, name) for name in [*_TAGS, *_EXPRESSIONS, "Template"])

    def visit(node, depth: int) -> int:
        """Nodes and literal characters below and with this one: what a step of a loop costs."""
        if depth > MAX_DEPTH:
            raise TemplateError(f"nests deeper than {MAX_DEPTH}")
        kind = type(node).__name__
        if not isinstance(node, allowed) or (isinstance(node, nodes.For) and node.recursive):
            raise TemplateError(f"uses `{kind.lower()}`, which prompt templates may not")
        if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            raise TemplateError(f"reads the attribute {node.attr!r}")
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            if isinstance(node.arg.value, str) and node.arg.value.startswith("__"):
                raise TemplateError(f"reads the attribute {node.arg.value!r}")
        if isinstance(node, nodes.Call):
            name = getattr(node.node, "attr", None) or getattr(node.node, "name", None)
            is_method = isinstance(node.node, nodes.Getattr)
            known = _METHODS | _CHANGES if is_method else _FUNCTIONS
            if not isinstance(node.node, (nodes.Getattr, nodes.Name)) or name not in known:
                raise TemplateError(f"calls `{name or kind}`, which prompt templates may not")
        if (
            isinstance(node, nodes.Filter)
            and node.name == "join"
            and (len(node.args) > 1 or any(pair.key == "attribute" for pair in node.kwargs))
        ):
            raise TemplateError("uses `join` with an attribute: write map(attribute=...) first")
        size = 1 + sum(visit(child, depth + 1) for child in node.iter_child_nodes())
        if isinstance(node, nodes.TemplateData):
            size += len(node.data)
        compares = isinstance(node, (nodes.Compare, nodes.Operand))
        for field, value in list(node.iter_fields()):
            if isinstance(value, nodes.Expr):
                setattr(node, field, _metered(nodes, value, compares))
            elif isinstance(value, list):
                value[:] = [_metered(nodes, item, False) for item in value]
        if isinstance(node, nodes.Output):
            node.nodes = [
                value
                if isinstance(value, nodes.TemplateData)
                else _as_filter(nodes, value, PRINT, [nodes.Const(spelling(value))])
                for value in node.nodes
            ]
        if isinstance(node, nodes.For):
            node.iter = _as_filter(nodes, node.iter, LOOP, [nodes.Const(size)])
        return size

    visit(tree, 0)
    return tree


def _as_filter(nodes, value, name: str, args: list):
    return nodes.Filter(
        value, name, args, [], None, None, lineno=value.lineno, environment=value.environment
    )


def _metered(nodes, value, is_compared: bool):
    if isinstance(value, nodes.Concat):
        values = nodes.List(value.nodes, lineno=value.lineno, environment=value.environment)
        return _as_filter(nodes, values, CONCAT, [])
    makes = isinstance(value, (nodes.List, nodes.Dict)) or (
        isinstance(value, nodes.Tuple) and value.ctx == "load"
    )
    cuts = isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice)
    if makes or cuts or (is_compared and not isinstance(value, nodes.Const)):
        return _as_filter(nodes, value, WEIGH, [])
    return value


def _make_tests(tests: dict) -> dict:
    """Return Jinja's tests, metered, as some of them compare their arguments."""

    def metered(test):
        def call(*args, **kwargs):
            now.charge(sum(map(weigh, args)))
            return test(*args, **kwargs)

        return call

    inspects_environment = ("filter", "test")
    return {name: metered(test) for name, test in tests.items() if name not in inspects_environment}


def _check_operation(operator: str, left, right) -> None:
    sized = (str, list, tuple)
    if operator == "%" and isinstance(left, str):
        raise TemplateError("formats with `%`, which prompt templates may not")
    if operator == "*" and (isinstance(left, sized) or isinstance(right, sized)):
        value, times = (left, right) if isinstance(left, sized) else (right, left)
        if isinstance(times, int) and times > 0:
            bound = MAX_TEXT_CHARS if isinstance(value, str) else MAX_LIST_ITEMS
            if len(value) * times > bound:
                raise TemplateError(f"repeats to more than {bound:,}")
    elif operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) + len(right) > MAX_LIST_ITEMS:
            raise TemplateError(f"makes a list of more than {MAX_LIST_ITEMS:,} entries")
    elif isinstance(left, int) and isinstance(right, int):
        bits = abs(left).bit_length() * max(1, right) if operator == "**" else 0
        if bits > MAX_INTEGER_BITS:
            raise TemplateError(f"makes a number of more than {MAX_INTEGER_BITS} bits")


@lru_cache(maxsize=1)
def _environment():
    import jinja2.utils
    from jinja2 import Undefined, pass_context
    from jinja2.sandbox import SandboxedEnvironment

    class Missing(Undefined):
        """An absent field renders as nothing and equals nothing, as usual, and is noted."""

        __slots__ = ()

        def _note(self):
            name = self._undefined_name
            if isinstance(name, Missing):  # {...}[missing field]
                name._note()
            elif isinstance(name, str):
                now.missing.append(name)
            else:  # beyond the end of a list; the first or last item of an empty one
                now.missing.append("item" if name is None else f"item {name}")

        def __str__(self):
            self._note()
            return ""

        def __iter__(self):
            self._note()
            return iter(())

        def __len__(self):
            self._note()
            return 0

        def __bool__(self):
            self._note()
            return False

        def __eq__(self, other):
            self._note()
            return super().__eq__(other)

        def __ne__(self, other):
            return not self == other

        __hash__ = Undefined.__hash__

    class Namespace(jinja2.utils.Namespace):
        def __repr__(self):  # not what it holds, which nobody has weighed
            return "<namespace>"

    class Environment(SandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

        def _parse(self, source, name, filename):
            tree = super()._parse(source, name, filename)
            mark_deciding_values(tree)
            return _check_and_meter(tree)

        def unsafe_undefined(self, obj, attribute):
            raise TemplateError(f"reads the attribute {attribute!r}")

        def call_binop(self, context, operator, left, right):
            _check_operation(operator, left, right)
            result = super().call_binop(context, operator, left, right)
            now.charge(weigh(result))
            return result

        def call(__self, __context, __function, *args, **kwargs):  # noqa: N805, names as Jinja's
            kwargs.pop("_loop_vars", None)  # Jinja's own, inside of loops
            kwargs.pop("_block_vars", None)
            if __function in (bounded_range, bounded_zip, Namespace):
                return __function(*args, **kwargs)
            owner = getattr(__function, "__self__", None)
            name = getattr(__function, "__name__", None)
            known = name in _METHODS or name in _CHANGES
            if not known or not isinstance(owner, (str, list, tuple, dict)):
                raise TemplateError(f"calls `{name}`, which prompt templates may not")
            now.charge(1 + (sum(map(weigh, args)) if name in _CHANGES else len(owner)))
            if name in _PRODUCTS:
                product_charge(owner, *args, *kwargs.values())
            if name == "join":
                return join_texts(owner, *args, **kwargs)
            if name == "replace":
                return replace_text(owner, *args, **kwargs)
            result = __function(*args, **kwargs)
            if name in _CHANGES and len(owner) > MAX_LIST_ITEMS:
                raise TemplateError(f"makes a list of more than {MAX_LIST_ITEMS:,} entries")
            if isinstance(result, (str, list, tuple)):
                now.charge(weigh(result))
            return result

    environment = Environment(undefined=Missing, optimized=False, cache_size=0)
    environment.filters.clear()
    environment.filters.update(make_filters())
    environment.filters[DECIDES] = pass_context(lambda context, *args: note_deciding_value(*args))
    environment.tests = _make_tests(environment.tests)
    environment.globals.clear()
    environment.globals.update(range=bounded_range, zip=bounded_zip, namespace=Namespace)

    return environment


@lru_cache(maxsize=8192)
def compile_source(source: str):
    """Compile a template; once per text.

    Raises:
        TemplateError: it uses what templates may not, or is not a template.
    """
    import jinja2

    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateError(f"is longer than {MAX_SOURCE_CHARS:,} characters")
    if _RAW.search(source):  # its braces are text, which nothing else here knows
        raise TemplateError("uses `raw`, which prompt templates may not")
    try:
        return _environment().from_string(source)
    except TemplateError:
        raise
    except (jinja2.TemplateError, SyntaxError) as error:
        raise TemplateError(f"is not a template: {error}") from None
    except (RecursionError, MemoryError, OverflowError, ValueError) as error:
        raise TemplateError(f"is not a template: {type(error).__name__}: {error}") from None


def fields_read(source: str) -> set[str]:
    """Find the fields of a row that a template reads.

    Raises:
        TemplateError: see :func:`compile_source`.
    """
    from jinja2 import meta

    compile_source(source)
    return meta.find_undeclared_variables(_environment().parse(source))


@lru_cache(maxsize=8192)
def _changes_lists(source: str) -> bool:
    return bool(_CHANGE.search(source))


class ProtectedRow(dict):
    """A row after ``protect``, for many templates; caches its answer choices."""

    __slots__ = ("choices",)

    def __init__(self, row: dict):
        super().__init__(protect(row))
        self.choices: dict[tuple, tuple[list[str], list[str]]] = {}


def protect(value: Any) -> Any:
    """Hide every ``|||`` in the texts of ``value`` from the split of prompt and answer.

    The value itself is returned where there is none, as nearly always.
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
    """Text of one rendering (still protected), and what it read that an example must not have."""

    __slots__ = ("text", "missing", "unlabelled", "used_choices", "is_cut")

    def __init__(self, text: str):
        self.text = text
        self.missing, self.unlabelled = now.missing, now.unlabelled
        self.used_choices, self.is_cut = now.used_choices, now.is_cut


def render_source(
    source: str, values: dict, seed: int | None, *, cuts: bool = True
) -> RenderedSource:
    """Render Jinja text with the (protected) fields of ``values``.

    Args:
        seed: of the filter ``choice``; None takes the first item of every list.
        cuts: cut every ``{{ ... }}`` at 2048 characters.

    Raises:
        TemplateError: the template exceeds a bound, or fails on this row; the message says how.
    """
    from jinja2.sandbox import SecurityError

    template = compile_source(source)
    if _changes_lists(source):
        values = copy.deepcopy(values)
    now.start(seed, cuts)
    try:
        pieces = []
        for piece in template.generate(values):  # each is rendered when it is asked for
            pieces.append(piece)
            now.is_answer = now.is_answer or _PIPE in piece
        text = "".join(pieces)
    except TemplateError:
        raise
    except SecurityError as error:
        raise TemplateError(f"reaches outside its row: {error}") from None
    except (RecursionError, MemoryError) as error:
        raise TemplateError(f"needs too much memory: {type(error).__name__}") from None
    except Exception as error:  # untrusted code: whatever it raises is its own failure
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise TemplateError(f"fails on this row: {kind}{error}") from None
    return RenderedSource(text)
