"""Pages and charts as trees of elements, so that no test takes drawn text for a coordinate, or a cell for a tag."""

from __future__ import annotations

from html.parser import HTMLParser
from xml.etree.ElementTree import Element, TreeBuilder, fromstring

VOID = {"br", "hr", "img", "input", "link", "meta"}


def svg_of(text: str) -> Element:
    """A chart, which must be well-formed XML."""
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
    """A page of ours, all of whose elements but the void ones are closed."""
    parser = _Page()
    parser.feed(text.removeprefix("<!doctype html>").strip())
    parser.close()
    return parser.tree.close()


def said(element: Element) -> str:
    """All text in an element, with single spaces."""
    return " ".join("".join(element.itertext()).split())


def rows_of(table: Element) -> list[list[str]]:
    """The cells of the rows of a table's body."""
    return [[said(cell) for cell in row] for row in table.findall("tbody/tr")]


def table_of(page: Element, caption: str) -> list[list[str]]:
    """The rows of the one table whose caption begins so."""
    (found,) = (t for t in page.iter("table") if said(t.find("caption")).startswith(caption))  # type: ignore[arg-type]
    return rows_of(found)
