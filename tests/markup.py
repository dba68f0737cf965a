"""Parse pages and charts into element trees, so that no test confuses drawn text with coordinates or tags."""

from __future__ import annotations

from html.parser import HTMLParser
from xml.etree.ElementTree import Element, TreeBuilder, fromstring

VOID = {"br", "hr", "img", "input", "link", "meta"}


def svg_of(text: str) -> Element:
    """The element tree of a chart, which must be well-formed XML."""
    return fromstring(text)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tree = TreeBuilder()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attributes})
        if tag in VOID:
            self.tree.end(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attributes})
        self.tree.end(tag)

    def handle_endtag(self, tag: str) -> None:
        self.tree.end(tag)

    def handle_data(self, data: str) -> None:
        self.tree.data(data)


def page_of(text: str) -> Element:
    """The element tree of a report page, in which all elements except void ones must be closed."""
    parser = _Page()
    parser.feed(text.removeprefix("<!doctype html>").strip())
    parser.close()
    return parser.tree.close()


def text_of(element: Element) -> str:
    """The text in an element, with single spaces."""
    return " ".join("".join(element.itertext()).split())


def rows_of(table: Element) -> list[list[str]]:
    """The text of the cells of a table's body, row by row."""
    return [[text_of(cell) for cell in row] for row in table.findall("tbody/tr")]


def table_of(page: Element, caption: str) -> list[list[str]]:
    """The rows of the only table with a caption that starts with `caption`."""
    (found,) = (t for t in page.iter("table") if text_of(t.find("caption")).startswith(caption))  # type: ignore[arg-type]
    return rows_of(found)
