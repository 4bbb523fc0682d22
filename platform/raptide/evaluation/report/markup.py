"""HTML and SVG from values. Text is escaped unless it is markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

LONGEST_WORD = 22

VOID = {"meta", "img", "br"}


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


NOTHING = Markup("")


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        children: strings, escaped; `Markup`, as it is.
        attributes: `class_` is class, `aria_label` aria-label; None leaves one out.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opened = f"<{name}{words}>"
    return Markup(opened if name in VOID else f"{opened}{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children))


def table(
    caption: str, head: Sequence[Sequence[Markup]], body: Iterable[Sequence[Markup]]
) -> Markup:
    """A table in a box of its own that scrolls; `head` and `body` are rows of cells."""
    rows = [tag("tr", *cells) for cells in body]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", *(tag("tr", *cells) for cells in head)),
            tag("tbody", *rows),
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=caption,
    )


def heads(*names: str) -> list[Markup]:
    return [column_head(name) for name in names]


def column_head(name: str, class_: str | None = None) -> Markup:
    """The head of a column that does not break words of usual length."""
    longest = min(max(map(len, name.split()), default=0), LONGEST_WORD)
    return tag(
        "th", name, scope="col", class_=class_, style=f"min-width:{1.15 * longest + 2:.0f}ch"
    )


def cell(*children: object, class_: str | None = None) -> Markup:
    return tag("td", *children, class_=class_)


def row_head(*children: object) -> Markup:
    return tag("th", *children, scope="row")


def small(text: str) -> Markup:
    return tag("span", text, class_="small") if text else NOTHING


def paragraphs(text: str) -> Markup:
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    return join(tag("p", part) for part in parts if part)


def bullets(items: Iterable[object], class_: str | None = None) -> Markup:
    made = [tag("li", item) for item in items]
    return tag("ul", *made, class_=class_) if made else NOTHING


def folded(summary: str, *children: object) -> Markup:
    return tag("details", tag("summary", summary), *children)


def pairs(values: Mapping[str, str]) -> Markup:
    """Names and what they stand for."""
    items = [
        part
        for name, value in values.items()
        for part in (tag("dt", name), tag("dd", tag("code", value)))
    ]
    return tag("dl", *items)
