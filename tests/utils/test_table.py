"""Tables as text and HTML. Oracle: by hand, and the standard library's HTML parser."""

from html.parser import HTMLParser

from metro.utils.table import Table

TABLE = Table(["task", "mean"], [["rte", "59.00"], ["<b>", "7.00"]], "Title", ["partial: <b>"])


def test_text_is_aligned_with_title_and_notes():
    """Oracle: by hand: names to the left, numbers to the right."""
    assert str(TABLE).splitlines() == [
        "Title",
        "task   mean",
        "rte   59.00",
        "<b>    7.00",
        "note: partial: <b>",
    ]


def test_html_holds_the_texts_as_texts():
    """Oracle: what a parser reads."""
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)
    parser.handle_data = texts.append
    parser.feed(TABLE._repr_html_())
    assert texts == ["Title", "task", "mean", "rte", "59.00", "<b>", "7.00", "partial: <b>"]
    assert tags.count("tr") == 3 and "b" not in tags
