"""HTML out of text that is not trusted: whatever is no `Markup` is escaped."""

from collections.abc import Iterable
from html import escape
from typing import Any


class Markup(str):
    """HTML that was made here."""


def text(value: Any) -> Markup:
    """A value as HTML: escaped, but for what already is `Markup`; characters that no page may have are replaced."""
    if isinstance(value, Markup):
        return value
    plain = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return Markup(escape(plain.encode("utf-8", "replace").decode()))


def tag(name: str, *inside: Any, **attributes: str) -> Markup:
    """An element; `class_` is its class."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{said}>{join(inside)}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Parts one after the other."""
    return Markup("".join(text(part) for part in parts))


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> Markup:
    """A table that scrolls by itself where the screen is narrow."""
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", *(tag("th", cell) for cell in head))),
            tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)),
        ),
        class_="wide",
    )


def folded(summary: Any, *inside: Any) -> Markup:
    """What is shown when one asks for it."""
    return tag("details", tag("summary", summary), *inside)
