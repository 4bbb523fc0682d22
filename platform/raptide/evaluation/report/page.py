"""The report: one HTML file that needs nothing else, no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raptide.evaluation.report.content import ReportContent, distinguish
from raptide.evaluation.report.markup import NOTHING, Markup, join, tag
from raptide.evaluation.report.sections import (
    anchor,
    circumstances,
    comparisons,
    described,
    emergence,
    lineage,
    summary,
)
from raptide.evaluation.report.style import STYLE
from raptide.evaluation.report.tasks import Album, task_section
from raptide.storage import Storage

REPORT = "report.html"

PICTURES_BYTES = 3_500_000
"""What pictures of a page may weigh together."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is fetched, and nothing runs, whatever the data say."""


def write_page(content: ReportContent, file: Path) -> Path:
    """Write the report, whole or not at all. Names that are no Unicode come out escaped."""
    data = render_page(content).encode("utf-8", "backslashreplace")
    Storage.of(file.parent).write(file.name, lambda stream: stream.write(data))
    return file


def render_page(content: ReportContent) -> str:
    """The report as HTML."""
    content = distinguish(content)
    album = Album(PICTURES_BYTES)
    parts = [
        ("summary", "Summary", summary(content)),
        *((anchor(t.name), t.name, task_section(content, t, album)) for t in content.tasks),
        ("comparisons", "Which differences mean something", _comparisons(content)),
        ("emergence", "What emerges as it learns", join(map(emergence, content.emergence))),
        ("lineage", "From corpus to weights", lineage(content)),
        ("run", "How this was run", circumstances(content)),
    ]
    shown = [part for part in parts if part[2]]
    tasks = {anchor(task.name) for task in content.tasks}
    body = [
        made if key in tasks else tag("section", tag("h2", title), made, id=key)
        for key, title, made in shown
    ]
    few = f"{album.left_out} pictures were left out, so that this page stays small."
    header = join(
        [
            tag("h1", f"What was learned: {content.benchmark}"),
            tag("p", described(content)),
            tag("p", few, class_="small") if album.left_out else NOTHING,
        ]
    )
    title = f"{content.benchmark}: {', '.join(model.name for model in content.models)}"
    return document(title, header, [(key, title) for key, title, _ in shown], body)


def document(
    title: str, header: Markup, sections: Sequence[tuple[str, str]], body: Sequence[Markup]
) -> str:
    """A whole page.

    Args:
        sections: id and title of each, for the links to them; the first is the summary.
        body: the sections.
    """
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name in sections]
    return "<!DOCTYPE html>\n" + tag(
        "html",
        _head(title),
        tag(
            "body",
            tag("a", "To the summary", href=f"#{sections[0][0]}", class_="skip"),
            tag("header", header),
            tag("nav", tag("ul", *links), aria_label="Sections"),
            tag("main", *body),
        ),
        lang="en",
    )


def _head(title: str) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )


def _comparisons(content: ReportContent) -> Markup:
    return comparisons(content) if content.comparisons else NOTHING
