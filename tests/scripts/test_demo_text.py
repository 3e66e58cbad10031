"""The demonstration text is prose from documentation, always the same. Oracle: a small tree."""

import pytest

from scripts.demo_text import documents, is_prose, prose_paragraphs, write_demo_text

SENTENCE = (
    "The distance between two points is the length of the straight line that joins them both."
)
MODULE = f'''"""{SENTENCE}

    >>> distance(1, 2)  # An example that is certainly not prose although it ends with a stop.
    1

x : array of float
    An array of points, each with as many coordinates as the space has dimensions, in any order.
"""

def f():
    """Short."""

raise SystemExit("modules are read and never run")
'''


def test_paragraphs_are_unwrapped_and_stripped_of_markup():
    text = """
    The :func:`~scipy.optimize.minimize` function finds a minimum of ``fun``, which may be any
    callable that takes one array and returns a number (see `the guide <http://x.y/z>`_).
    """
    assert prose_paragraphs(text) == [
        "The scipy.optimize.minimize function finds a minimum of fun, which may be any callable "
        "that takes one array and returns a number (see the guide)."
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "no capital " * 8 + ".",
        "A heading without a full stop that is nevertheless quite a long line of words",
        "A B = C + 1 + D / 2 + E[3] + F(4, 5) * G - 6 + H * 7 + 8 - 9 + K.",
        "A table | with | columns | is | no | prose | even | if | it | ends | so.",
    ],
)
def test_what_is_not_prose_is_left_out(text):
    assert not is_prose(text)


def test_documents_are_modules_without_repetitions(tmp_path):
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "b.py").write_text(MODULE.replace("An array of points", "A list of points"))
    (tmp_path / "broken.py").write_text("def :\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/c.py").write_text(MODULE.replace("straight", "curved"))
    explanation = (
        "of points, each with as many coordinates as the space has dimensions, in any order."
    )
    assert list(documents([tmp_path])) == [
        [SENTENCE, f"An array {explanation}"],
        [f"A list {explanation}"],
    ]


def test_text_is_written_whole_and_stops_at_the_size(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(f'"""\n{SENTENCE[:-1]} {name}.\n"""\n')
    path = tmp_path / "text.txt"
    assert write_demo_text(path, len(SENTENCE) + 10, roots=[tmp_path]) == path.stat().st_size
    assert path.read_text() == f"{SENTENCE[:-1]} a.\n\n{SENTENCE[:-1]} b.\n\n"
    assert not path.with_suffix(".tmp").exists()


def test_nothing_to_read_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="DEMO_TEXT"):
        write_demo_text(tmp_path / "text.txt", 100, roots=[tmp_path])
