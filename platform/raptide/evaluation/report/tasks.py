"""A task's section: numbers, pictures, controls, notes, and how it is all computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raptide.evaluation.report.charts import Series, bar_chart, line_chart, scatter
from raptide.evaluation.report.content import (
    Place,
    Reference,
    ReportContent,
    Row,
    TaskEntry,
    place_of,
)
from raptide.evaluation.report.markup import (
    NOTHING,
    Markup,
    bullets,
    cell,
    column_head,
    folded,
    heads,
    join,
    paragraphs,
    row_head,
    small,
    table,
    tag,
)
from raptide.evaluation.report.pictures import heatmap
from raptide.evaluation.report.sections import MOST_ROWS, anchor, left_out
from raptide.evaluation.report.words import DASH, direction, interval, listed, number
from raptide.evaluation.results import Heatmap, Lines, Points

SHOWN_ROWS = 8
"""Of a task's numbers; the others are folded away."""

MOST_PICTURES = 6
"""Of one kind and subject in a task."""


@dataclass
class Album:
    """Pictures within what a page may weigh."""

    room_bytes: int
    left_out: int = 0

    def admit(self, pictures: Iterable[Markup]) -> list[Markup]:
        """Those for which there is room, in order."""
        admitted = []
        for each in pictures:
            if len(each) <= self.room_bytes:
                self.room_bytes -= len(each)
                admitted.append(each)
            else:
                self.left_out += 1
        return admitted


@dataclass
class Columns:
    """Who stands in a task's table, in order."""

    models: list[str]
    baselines: list[str]
    published: list[str]
    sources: list[str]

    def head(self) -> list[list[Markup]]:
        """Two rows: groups, and names."""
        groups = {"models": self.models, "baselines": self.baselines, "published": self.published}
        there = {name: columns for name, columns in groups.items() if columns}
        first = [
            tag("th", name, colspan=len(columns), scope="colgroup", class_="first")
            for name, columns in there.items()
        ]
        names = [
            column_head(name, "first" if i == 0 else None)
            for columns in there.values()
            for i, name in enumerate(columns)
        ]
        return [[tag("th", "number", rowspan=2, scope="col"), *first], names]


def task_section(content: ReportContent, task: TaskEntry, album: Album) -> Markup:
    """Everything of one task."""
    rows = [row for row in content.rows if row["task"] == task.name]
    drawn = album.admit(pictures(content, task))
    return tag(
        "section",
        tag("h2", task.name),
        tag("p", f"Kind {task.kind}; main metric {task.main_metric}."),
        number_tables(content, task, rows),
        tag("h3", "Pictures") if drawn else NOTHING,
        tag("div", *drawn, class_="figures") if drawn else NOTHING,
        _controls(content, task),
        _notes(task),
        tag("h3", "How it is computed"),
        paragraphs(task.how),
        _datasets(task),
        id=anchor(task.name),
    )


def number_tables(content: ReportContent, task: TaskEntry, rows: Sequence[Row]) -> Markup:
    """Main numbers, then the others, then controls, with published ones beside."""
    columns = _columns(content, task, rows)
    groups: dict[Place, list[Row]] = {}
    for row in rows:
        groups.setdefault(place_of(row), []).append(row)
    tested = [p for p, some in groups.items() if some[0]["role"] in ("control", "chance")]
    main = [p for p, some in groups.items() if any(row["role"] == "main" for row in some)]
    others = [p for p in groups if p not in set(tested) | set(main)]
    first = [*main, *others] if len(main) + len(others) <= SHOWN_ROWS else main
    parts = [_number_table(f"{task.name}: numbers with intervals", content, groups, first, columns)]
    if rest := [p for p in others if p not in set(first)]:
        caption = f"{task.name}: all other numbers"
        made = _number_table(caption, content, groups, rest, columns)
        parts.append(folded(f"All other numbers ({len(rest):,})", made))
    if tested:
        caption = f"{task.name}: controls"
        parts.append(folded("Controls", _number_table(caption, content, groups, tested, columns)))
    if columns.sources:
        sources = "; ".join(columns.sources)
        parts.append(tag("p", f"Published numbers: {sources}.", class_="small"))
    return join(parts)


def _columns(content: ReportContent, task: TaskEntry, rows: Sequence[Row]) -> Columns:
    there = {row["model"] for row in rows}
    known = [each for each in content.references if each.task == task.name]
    return Columns(
        [each.name for each in content.models if each.name in there],
        [each.name for each in content.baselines if each.name in there],
        list(dict.fromkeys(each.model for each in known)),
        list(dict.fromkeys(each.source for each in known)),
    )


def _number_table(
    caption: str,
    content: ReportContent,
    groups: dict[Place, list[Row]],
    places: Sequence[Place],
    columns: Columns,
) -> Markup:
    if not places:
        return NOTHING
    published = {(each.place, each.model): each for each in content.references}
    body = []
    for place in places[:MOST_ROWS]:
        by_model: dict[str, list[Row]] = {}
        for row in groups[place]:
            by_model.setdefault(row["model"], []).append(row)
        first = groups[place][0]
        where = f"{place[1]}; {direction(first['higher_is_better'])}"
        body.append(
            [
                row_head(place[2], small(where)),
                *_value_cells([by_model.get(each, []) for each in columns.models]),
                *_value_cells([by_model.get(each, []) for each in columns.baselines]),
                *_published_cells([published.get((place, each)) for each in columns.published]),
            ]
        )
    return join([table(caption, columns.head(), body), left_out(len(places))])


def _value_cells(groups: Sequence[Sequence[Row]]) -> list[Markup]:
    cells = []
    for i, rows in enumerate(groups):
        parts: list[object] = []
        for row in rows:
            layer = row["layer"]
            where = f"layer {layer}" if layer is not None and layer >= 0 else ""
            parts += [tag("span", number(row["value"])), small(interval(row)), small(where)]
        cells.append(cell(*(parts or [DASH]), class_="first" if i == 0 else None))
    return cells


def _published_cells(known: Sequence[Reference | None]) -> list[Markup]:
    return [
        cell(DASH if each is None else number(each.value), class_="first" if i == 0 else None)
        for i, each in enumerate(known)
    ]


def pictures(content: ReportContent, task: TaskEntry) -> list[Markup]:
    """All of a task: charts that subjects share, then each one's own."""
    order = [each.name for each in [*content.models, *content.baselines]]
    subjects = [name for name in order if name in task.figures]
    shared: dict[tuple[object, ...], list[tuple[str, Lines]]] = {}
    own: list[tuple[str, Heatmap | Points]] = []
    for name in subjects:
        maps = 0
        for each in task.figures[name]:
            if isinstance(each, Lines):
                axis = (each.title, each.x_label, each.y_label, *(each.x_names or each.x))
                shared.setdefault(axis, []).append((name, each))
            elif maps < MOST_PICTURES:
                own.append((name, each))
                maps += 1
    baselines = {each.name for each in content.baselines}
    charts = [
        chart for lines in shared.values() for chart in _shared_charts(lines, order, baselines)
    ]
    by_title: dict[str, list[tuple[str, Heatmap | Points]]] = {}
    for name, each in own:  # the same of all subjects side by side
        by_title.setdefault(each.title, []).append((name, each))
    return charts + [made for some in by_title.values() for made in _own_pictures(some)]


def _shared_charts(
    lines: Sequence[tuple[str, Lines]], order: Sequence[str], baselines: set[str]
) -> list[Markup]:
    """A picture for each series of what subjects drew over one axis."""
    first = lines[0][1]
    panels: dict[str, list[Series]] = {}
    for subject, each in lines:
        for name, values in each.series.items():
            style = Series(subject, each.x, values, order.index(subject), subject in baselines)
            panels.setdefault("" if name == subject else name, []).append(style)
    charts = []
    for name, series in list(panels.items())[:MOST_PICTURES]:
        title = f"{first.title}: {name}" if name and len(panels) > 1 else first.title
        if first.x_names is None:
            charts.append(line_chart(title, first.x_label, first.y_label, series))
        else:
            charts.append(bar_chart(title, first.x_label, first.y_label, first.x_names, series))
    return charts


def _own_pictures(some: Sequence[tuple[str, Heatmap | Points]]) -> list[Markup]:
    """Pictures of one title; one that is the same for all, as of what was measured, once."""
    first = _values(some[0][1])
    if len(some) > 1 and all(np.array_equal(_values(each), first, True) for _, each in some):
        return [_own_picture("", some[0][1])]
    return [_own_picture(name, each) for name, each in some]


def _values(picture: Heatmap | Points) -> np.ndarray:
    return picture.values if isinstance(picture, Heatmap) else picture.xy


def _own_picture(subject: str, picture: Heatmap | Points) -> Markup:
    titled = ", ".join(filter(None, [picture.title, subject]))
    if isinstance(picture, Heatmap):
        return heatmap(
            Heatmap(
                titled,
                picture.values,
                picture.truth,
                picture.row_names,
                picture.column_names,
                picture.diverging,
            )
        )
    return scatter(Points(titled, picture.xy, picture.groups, picture.labels))


def _controls(content: ReportContent, task: TaskEntry) -> Markup:
    """Verdicts; those that subjects share are said once, those that warn come first."""
    said: dict[tuple[bool, str], list[str]] = {}
    for each in content.controls:
        if each.task == task.name:
            said.setdefault((each.at_chance, each.sentence), []).append(each.subject)
    items = []
    for (fine, sentence), who in sorted(said.items(), key=lambda item: item[0][0]):
        mark = "At chance: " if fine else "Not at chance: "
        span = tag("span", mark, class_="good" if fine else "bad")
        names = listed(list(dict.fromkeys(who)))  # one may have several controls
        items.append(join([span, ": ".join(filter(None, [names, sentence]))]))
    return join([tag("h3", "Controls"), bullets(items)]) if items else NOTHING


def _notes(task: TaskEntry) -> Markup:
    speakers: dict[str, list[str]] = {}
    for subject, sentences in task.notes.items():
        for sentence in sentences:
            speakers.setdefault(sentence, []).append(subject)
    everyone = len([name for name in task.notes if task.notes[name]])
    items = [
        sentence if len(who) == everyone and everyone > 1 else f"{listed(who)}: {sentence}"
        for sentence, who in speakers.items()
    ]
    return join([tag("h3", "Notes"), bullets(items)]) if items else NOTHING


def _datasets(task: TaskEntry) -> Markup:
    if not task.datasets:
        return NOTHING
    body = [
        [row_head(each.name), cell(tag("code", each.digest)), cell(each.file or DASH)]
        for each in task.datasets
    ]
    return folded("Data", table(f"{task.name}: data", [heads("data set", "digest", "file")], body))
