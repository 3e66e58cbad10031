"""Rows without a label, told from the class that a template would take them for.

A dataset hides the labels of its test split as ``-1``, ``""`` or null. Such a value is no index of
an answer choice, but ``{% if label == 1 %}yes{% else %}no{% endif %}`` makes a "no" of it, and
``answer_choices[label | int]`` the first choice of an empty text. So the places of a template where
a value decides on the answer are marked when it is compiled, and a mark that meets such a value
while the answer is rendered notes it. A value that the template itself names is a class:
``label == -1``.
"""

from typing import Any

from metro.data.prompts.limits import TemplateError, is_null, now

OUT_OF_RANGE, NO_LABEL = "label out of range of the answer choices", "no label"
DECIDES = "\0decides"  # a filter that no template can name
_LOOKUPS = frozenset({"find", "get", "index", "rfind", "rindex"})
_EQUALITY = frozenset({"eq", "ne", "in", "notin"})


class AnswerChoices(list):
    """Answer choices as a template sees them: a wrong index is an error, not a guess."""

    def __getitem__(self, index):
        problem = None
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


def note_deciding_value(value: Any, name: str, known: tuple, is_answer: bool) -> Any:
    """Note a value that is no label, and return it: the filter ``DECIDES``.

    Args:
        value: null, NaN, blank text and -1 are no labels.
        name: how the template spells it.
        known: values that the template names, or can do with.
        is_answer: the answer depends on it wherever it stands.
    """
    if is_answer or now.is_answer:
        is_blank = isinstance(value, str) and not value.strip()
        if (is_null(value) or is_blank or value == -1) and value not in known:
            now.unlabelled.append(f"{name} is {value!r}")
    return value


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
        node.test = _marked(node.test, ("",), chooses)  # `{% if text %}` knows empty texts
        for child in (node.test, *node.elif_):
            _mark(child, chooses)
        for child in (*node.body, *node.else_):
            _mark(child, False)
        return
    if isinstance(node, nodes.Assign):
        is_answer = True  # the variable may be read in the answer
    elif isinstance(node, nodes.CondExpr):
        node.test = _marked(node.test, ("",), is_answer)
    elif isinstance(node, nodes.Compare):
        known = tuple(_constants(node))
        if any(side.op not in _EQUALITY for side in node.ops):
            known = (*known, -1)  # a number among others: `score < 0`
        node.expr = _marked(node.expr, known, is_answer)
        for operand in node.ops:
            operand.expr = _marked(operand.expr, known, is_answer)
    elif isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
        node.arg = _marked(node.arg, (), is_answer)
        if isinstance(node.arg, nodes.BinExpr):  # options[label - 1]
            node.arg = _with_mark(node.arg, (), is_answer)
    elif isinstance(node, nodes.Call) and getattr(node.node, "attr", None) in _LOOKUPS:
        node.args = [_marked(value, (), is_answer) for value in node.args]
    for child in node.iter_child_nodes():
        _mark(child, is_answer)


def _marked(node: Any, known: tuple, is_answer: bool) -> Any:
    """Mark the fields that the value of ``node`` is made of."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name | nodes.Getattr | nodes.Getitem):
        return _with_mark(node, known, is_answer)
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


def _with_mark(node: Any, known: tuple, is_answer: bool) -> Any:
    from jinja2 import nodes

    arguments = [nodes.Const(value) for value in (spelling(node), known, is_answer)]
    place = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Filter(node, DECIDES, arguments, [], None, None, **place)


def _constants(comparison: Any) -> list:
    """Return the constants that a comparison names, those in lists too."""
    from jinja2 import nodes

    found = []
    for side in (comparison, *comparison.ops):
        for part in (side.expr, *side.expr.find_all(nodes.Expr)):
            if isinstance(part, nodes.Const):
                found.append(part.value)
            elif isinstance(part, nodes.Neg) and isinstance(part.node, nodes.Const):
                if isinstance(part.node.value, int | float):
                    found.append(-part.node.value)
    return found
