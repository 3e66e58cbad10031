"""Rows without a label, told from the class that a template would take them for.

A dataset hides the labels of its test split as ``-1``, ``""`` or null. Such a value is no index of
an answer choice, but ``{% if label == 1 %}yes{% else %}no{% endif %}`` makes a "no" of it, and
``answer_choices[label | int]`` the first choice of an empty text. So the places of a template where
a value decides on the answer are marked when it is compiled, and a mark that meets such a value
while the answer is rendered notes it. A value that the template itself names is a class:
``label == -1``. A text is never equal to a number, so that ``label == 1`` tells nothing of ``"1"``.
"""

from collections.abc import Iterator
from typing import Any

from metro.data.prompts.limits import TemplateError, is_null, now

OUT_OF_RANGE, NO_LABEL = "label out of range of the answer choices", "no label"
OTHER_KIND = "compared with values of another kind"
DECIDES = "\0decides"  # a filter that no template can name
_LOOKUPS = frozenset({"find", "get", "index", "rfind", "rindex"})
_EQUALITY = frozenset({"eq", "ne", "in", "notin"})
_EQUALITY_TESTS = frozenset("== != eq ne equalto in sameas true false".split())


class AnswerChoices(list):
    """Answer choices as a template sees them: a wrong index is an error, not a guess."""

    def __getitem__(self, index):
        problem = None
        if isinstance(index, float) and index.is_integer():  # of a column that has NaN elsewhere
            index = int(index)
        if isinstance(index, int) and not isinstance(index, bool):
            if not 0 <= index < len(self):
                problem = f"answer_choices has {len(self)} entries and none at {index}"
            elif now.is_answer:
                now.used_choices.append(index)
        elif index is None or isinstance(index, (str, float)):
            problem = f"answer_choices is read at {index!r}, which is not a whole number"
        if problem and now.unlabelled:
            raise TemplateError(", ".join(now.unlabelled), NO_LABEL)
        if problem:
            raise TemplateError(problem, OUT_OF_RANGE)
        return super().__getitem__(index)


def mark_deciding_values(tree: Any) -> None:
    """Mark the values that a parsed template compares, looks up or branches on, in place."""
    _mark(tree, is_answer=False)


def note_deciding_value(
    value: Any, name: str, known: tuple, is_answer: bool, is_compared: bool = False
) -> Any:
    """Note a value that is no label, and return it: the filter ``DECIDES``.

    Args:
        value: null, NaN, blank text and -1 are no labels.
        name: how the template spells it.
        known: values that the template names, or can do with.
        is_answer: the answer depends on it wherever it stands.
        is_compared: the template asks whether it is one of those that are known.

    Raises:
        TemplateError: it is a text, and the template asks for numbers, or the reverse.
    """
    if is_answer or now.is_answer:
        is_blank = isinstance(value, str) and not value.strip()
        if (is_null(value) or is_blank or value == -1) and value not in known:
            now.unlabelled.append(f"{name} is {value!r}")
        elif is_compared and {*map(_kind, known)} == ({str, float} - {_kind(value)}):
            others = "numbers" if isinstance(value, str) else "texts"
            raise TemplateError(f"compares {name}, which is {value!r}, with {others}", OTHER_KIND)
    return value


def _kind(value: Any) -> type | None:
    """Return ``float`` for numbers, ``str`` for texts, None for all else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float
    return str if isinstance(value, str) else None


def spelling(node: Any) -> str:
    """Return an expression about as the template spells it: ``answers.label``."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return f"{spelling(node.node)}.{node.attr}"
    if isinstance(node, nodes.Getitem):
        return f"{spelling(node.node)}[{spelling(node.arg)}]"
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Const):
        return repr(node.value)
    if isinstance(node, nodes.Filter) and node.node is not None:
        return spelling(node.node)
    return "..."


def _mark(node: Any, is_answer: bool) -> None:
    from jinja2 import nodes

    if isinstance(node, nodes.If):
        # Where the branches have an answer each, the condition chooses between them.
        chooses = is_answer or any("|||" in text.data for text in node.find_all(nodes.TemplateData))
        node.test = _marked(node.test, (), chooses)
        for child in (node.test, *node.elif_):
            _mark(child, chooses)
        for child in (*node.body, *node.else_):
            _mark(child, False)
        return
    if isinstance(node, nodes.Assign):
        is_answer = True  # the variable may be read in the answer
    elif isinstance(node, nodes.CondExpr):
        node.test = _marked(node.test, (), is_answer)
    elif isinstance(node, nodes.Compare):
        known = tuple(_constants(node, *node.ops))
        is_compared = all(side.op in _EQUALITY for side in node.ops)
        if not is_compared:
            known = (*known, -1)  # a number among others: `score < 0`
        node.expr = _marked(node.expr, known, is_answer, is_compared)
        for operand in node.ops:
            operand.expr = _marked(operand.expr, known, is_answer, is_compared)
    elif isinstance(node, nodes.Test) and node.name in _EQUALITY_TESTS:
        node.node = _marked(node.node, tuple(_constants(*node.args)), is_answer, True)
    elif isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
        node.arg = _marked(node.arg, (), is_answer)
        if isinstance(node.arg, nodes.BinExpr):  # options[label - 1]
            node.arg = _with_mark(node.arg, (), is_answer, False)
    elif isinstance(node, nodes.Call) and getattr(node.node, "attr", None) in _LOOKUPS:
        node.args = [_marked(value, (), is_answer) for value in node.args]
    for child in node.iter_child_nodes():
        _mark(child, is_answer)


def _marked(node: Any, known: tuple, is_answer: bool, is_compared: bool = False) -> Any:
    """Mark the fields that the value of ``node`` is made of."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name | nodes.Getattr | nodes.Getitem):
        return _with_mark(node, known, is_answer, is_compared)
    if isinstance(node, nodes.Filter) and node.name not in ("d", "default"):
        node.node = _marked(node.node, known, is_answer)
    elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        node.node.node = _marked(node.node.node, known, is_answer)  # label.strip()
    elif isinstance(node, nodes.Not):
        node.node = _marked(node.node, known, is_answer)
    elif isinstance(node, nodes.BinExpr):
        if isinstance(node, nodes.Add):
            known = (*known, -1)  # of the classes -1, 0, 1: `label + 1`
        node.left = _marked(node.left, known, is_answer)
        node.right = _marked(node.right, known, is_answer)
    return node


def _with_mark(node: Any, known: tuple, is_answer: bool, is_compared: bool) -> Any:
    from jinja2 import nodes

    arguments = [nodes.Const(value) for value in (spelling(node), known, is_answer, is_compared)]
    place = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Filter(node, DECIDES, arguments, [], None, None, **place)


def _constants(*sides: Any) -> Iterator[Any]:
    """Yield the constants that the sides of a comparison are, or list."""
    from jinja2 import nodes

    for side in sides:
        if isinstance(side, nodes.Compare | nodes.Operand):
            yield from _constants(side.expr)
        elif isinstance(side, nodes.List | nodes.Tuple):
            yield from _constants(*side.items)
        elif isinstance(side, nodes.Const):
            yield side.value
        elif isinstance(side, nodes.Neg) and isinstance(side.node, nodes.Const):
            if isinstance(side.node.value, int | float):
                yield -side.node.value
