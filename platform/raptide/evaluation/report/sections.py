"""The report's sections on what all tasks share: summary, comparisons, emergence, lineage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raptide.evaluation.report.charts import Series, line_chart
from raptide.evaluation.report.content import (
    Comparison,
    Emergence,
    Moment,
    ReportContent,
    SubjectEntry,
    place_of,
)
from raptide.evaluation.report.markup import (
    NOTHING,
    Markup,
    bullets,
    cell,
    folded,
    heads,
    join,
    pairs,
    row_head,
    small,
    table,
    tag,
)
from raptide.evaluation.report.words import (
    DASH,
    MainLine,
    count,
    direction,
    has,
    interval,
    main_lines,
    number,
    plain_statement,
    standing,
    verdict,
)

MOST_ROWS = 300
"""Of a table; the rest stands in results.parquet."""

MOST_MOMENTS = 60
SHORT_DIGEST = 12


def summary(content: ReportContent) -> Markup:
    """Main metrics of all models with the best baseline, and what is not beaten in words."""
    lines = main_lines(content)
    models = [model.name for model in content.models]
    head = heads("task", *models, "best baseline", "published")
    body = [[_line_head(line), *_line_cells(content, line, models)] for line in lines[:MOST_ROWS]]
    caption = "Main metrics, with 95% bootstrap intervals"
    return join(
        [
            table(caption, [head], body),
            left_out(len(lines)),
            _standings(content, lines),
        ]
    )


def _line_head(line: MainLine) -> Markup:
    task, dataset, metric = line.place
    return row_head(
        tag("a", task, href=f"#{anchor(task)}"),
        small(f"{dataset}, {metric}; {direction(line.higher_is_better)}"),
    )


def _line_cells(content: ReportContent, line: MainLine, models: Sequence[str]) -> list[Markup]:
    cells = []
    for model in models:
        row = line.models.get(model)
        if row is None:
            cells.append(cell(DASH))
            continue
        words = standing(line, model)
        mark = "bad" if line.unbeaten(model) else "good"
        said = tag("span", words, class_=f"small standing {mark}") if words else NOTHING
        cells.append(cell(number(row["value"]), small(interval(row)), said))
    best = line.best_baseline()
    if best is None:
        cells.append(cell(DASH))
    else:
        cells.append(cell(number(best["value"]), small(interval(best)), small(best["model"])))
    known = [each for each in content.references if each.place == line.place]
    values = [each.value for each in known]
    published = f"{number(min(values))} to {number(max(values))}" if known else DASH
    return [*cells, cell(published, small(count(len(known), "model") if known else ""))]


def _standings(content: ReportContent, lines: Sequence[MainLine]) -> Markup:
    """What is not beaten, with its numbers, and how much is."""
    asked = [
        (line, model)
        for line in lines
        for model in line.models
        if plain_statement(content, line, model)
    ]
    if not asked:
        return NOTHING
    lost = [
        join([tag("span", "Not beaten: ", class_="bad"), plain_statement(content, line, model)])
        for line, model in asked
        if line.unbeaten(model)
    ]
    rule = (
        "A model beats a baseline where its whole interval lies on the better side of the "
        f"baseline's. In {len(asked) - len(lost)} of {len(asked)} main metrics of models every "
        "baseline is beaten."
    )
    return join([tag("h3", "Against the baselines"), tag("p", rule), bullets(lost[:MOST_ROWS])])


def comparisons(content: ReportContent) -> Markup:
    """Differences with verdicts and, where there are repeats, what seeds alone do."""
    main = {place_of(row) for row in content.rows if row["role"] == "main"}
    first = [each for each in content.comparisons if each.place in main]
    others = [each for each in content.comparisons if each.place not in main]
    parts = [_comparison_table("Differences in main metrics", content, first)]
    if others:
        more = _comparison_table("Differences in all other metrics", content, others)
        parts.append(folded(f"All other metrics ({len(others):,})", more))
    noise = (
        "The noise floor is two standard deviations of runs that differ in the seed alone."
        if content.noise
        else "No repeats with other seeds were given, so what seeds alone do is not known here."
    )
    how = (
        "A difference is that of the first model less the second. Its 95% interval comes of the "
        "same bootstrap draws for both where they were measured on the same units. It is better "
        "or worse only where the interval leaves out 0. "
    )
    return join([tag("p", how + noise), *parts])


def _comparison_table(
    caption: str, content: ReportContent, compared: Sequence[Comparison]
) -> Markup:
    if not compared:
        return NOTHING
    head = heads("number", "first", "second", "difference", "noise floor", "verdict on the first")
    body = []
    for each in compared[:MOST_ROWS]:
        noise = content.noise_of(each)
        what = ", ".join(filter(None, [each.dataset, each.metric, each.layers]))
        between = interval({"value": each.difference, "low": each.low, "high": each.high})
        mark = {"better": "good", "worse": "bad"}.get(each.verdict)
        body.append(
            [
                row_head(each.task, small(what)),
                cell(each.a, class_="text"),
                cell(each.b, class_="text"),
                cell(
                    ("+" if each.difference > 0 else "") + number(each.difference),
                    small(between),
                    small("" if each.paired else "not in pairs"),
                ),
                cell(number(noise)),
                cell(tag("span", verdict(each, noise), class_=mark), class_="text"),
            ]
        )
    return join([table(caption, [head], body), left_out(len(compared))])


def left_out(rows: int) -> Markup:
    if rows <= MOST_ROWS:
        return NOTHING
    return tag("p", f"{rows - MOST_ROWS:,} more rows stand in results.parquet.", class_="small")


def emergence(run: Emergence) -> Markup:
    """The paper's figure: what is learned as the loss falls; from blind to sharp, left to right."""
    names = list(dict.fromkeys(name for each in run.moments for name in each.metrics))
    by_ece = sum(math.isfinite(each.ece) for each in run.moments) >= 2
    drawn = [m for m in run.moments if math.isfinite(m.ece)] if by_ece else run.moments
    over = [m.ece if by_ece else float(m.step) for m in drawn]
    x_label = "held-out ECE, lower to the right" if by_ece else "step"
    charts = [
        line_chart(
            name,
            x_label,
            name,
            [Series(run.run, over, [m.metrics.get(name, math.nan) for m in drawn])],
            reverse_x=by_ece,
        )
        for name in names
    ]
    if by_ece:
        tokens = [float(m.tokens) for m in drawn]
        ece = Series(run.run, tokens, over)
        charts.insert(0, line_chart("held-out ECE", "tokens seen", "ECE", [ece]))
    stride = -(-len(run.moments) // MOST_MOMENTS)
    shown = run.moments[::-1][::stride][::-1] if stride > 1 else run.moments
    body = [_moment(each, names) for each in shown]
    head = heads("step", "tokens", "held-out ECE", *names)
    return join(
        [
            tag("h3", run.run),
            tag("div", *charts, class_="figures"),
            table(f"Checkpoints of {run.run}", [head], body),
        ]
    )


def _moment(moment: Moment, names: Sequence[str]) -> list[Markup]:
    return [
        row_head(f"{moment.step:,}"),
        cell(f"{moment.tokens:,}"),
        cell(number(moment.ece)),
        *(cell(number(moment.metrics.get(name))) for name in names),
    ]


def lineage(content: ReportContent) -> Markup:
    """From corpus to weights, for each model; baselines with their digests."""
    parts = [_descent(model) for model in content.models]
    if content.baselines:
        body = [
            [row_head(each.name), cell(tag("code", each.weights or DASH))]
            for each in content.baselines
        ]
        caption = "Baselines, and what their numbers depend on"
        parts.append(table(caption, [heads("baseline", "digest")], body))
    return join(parts)


def _descent(model: SubjectEntry) -> Markup:
    known = dict(flat(model.lineage))
    way = [
        f"corpus {known['corpus_digest'][:SHORT_DIGEST]}" if "corpus_digest" in known else "",
        f"run {known.get('run') or known.get('recipe.name') or known.get('wandb_run_id') or ''}",
        f"step {known['step']}" if "step" in known else "",
        f"weights {model.weights[:SHORT_DIGEST]}",
    ]
    steps = [each for each in way if each.strip() not in ("", "run")]
    short = {name: value for name, value in known.items() if not name.startswith(FOLDED)}
    rest = {name: value for name, value in known.items() if name.startswith(FOLDED)}
    none = tag("p", "The model's folder says nothing of where its weights come from.")
    return join(
        [
            tag("h3", model.name),
            tag("ol", *(tag("li", each) for each in steps), class_="way"),
            pairs({"weights": model.weights} | short) if known else none,
            folded("Recipe and fingerprint", pairs(rest)) if rest else NOTHING,
        ]
    )


FOLDED = ("recipe.", "fingerprint.")
"""Long parts of a lineage."""


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested fields as `a.b` and text."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif value is not None:
            yield name, f"{value:,}" if type(value) is int else str(value)


def circumstances(content: ReportContent) -> Markup:
    """Command, hardware, versions, and where the time went."""
    command = tag("pre", content.command) if content.command else NOTHING
    facts = ({"hardware": content.hardware} if content.hardware else {}) | content.versions
    return join([command, pairs(facts) if facts else NOTHING, _time(content)])


def _time(content: ReportContent) -> Markup:
    seconds: dict[tuple[str, str], float] = {}
    for row in content.rows:
        if has(row["seconds"]):
            key = row["model"], row["task"]
            seconds[key] = max(seconds.get(key, 0.0), row["seconds"])
    tasks = [task.name for task in content.tasks if any(t == task.name for _, t in seconds)]
    if not tasks:
        return NOTHING
    body = []
    for each in content.subjects:
        own = [seconds.get((each.name, task), math.nan) for task in tasks]
        total = sum(value for value in own if has(value))
        cells = [cell(number(value, 1)) for value in [*own, total]]
        body.append([row_head(each.name), *cells])
    return table("Seconds that each task took", [heads("subject", *tasks, "all")], body)


def described(content: ReportContent) -> str:
    """What was evaluated, in a sentence."""
    digests = {each.digest for task in content.tasks for each in task.datasets}
    return (
        f"{count(len(content.models), 'model')} and {count(len(content.baselines), 'baseline')} on "
        f"{count(len(content.tasks), 'task')} of the benchmark {content.benchmark}, with "
        f"{count(len(digests), 'data set')}; {count(len(content.rows), 'number')} in all."
    )


def anchor(task: str) -> str:
    """A fragment that any name can have."""
    return "task-" + "".join(c if c.isalnum() and c.isascii() else f"_{ord(c):x}_" for c in task)
