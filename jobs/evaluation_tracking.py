"""Put an evaluation into W&B: main metrics, tables of all numbers, and what was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from raptide.evaluation.report.content import ReportContent, Row, SubjectEntry
from raptide.evaluation.report.words import has
from raptide.evaluation.results import COLUMNS
from raptide.training.planning.recipe import TrackingSettings
from raptide.training.watching.tracking import resolve_mode

FILES = ("report.html", "results.json", "results.parquet")
"""Of an output folder, as far as they are there."""

MOST_CHARACTERS = 128
"""Of a run's name and an artifact's in W&B."""


def log_evaluation(output: Path, content: ReportContent) -> None:
    """A W&B run for each model, all in the benchmark's group, so that W&B compares them.

    Its summary holds main metrics as `bench/TASK/DATASET/METRIC`, with `/low` and `/high`; its
    table `numbers` all rows of the model and of the baselines; its artifact the report and the
    results. Offline W&B cannot look up what a run uses, so there a model counts as made by it.
    """
    import wandb

    for model in content.models:
        run = wandb.init(
            project=TrackingSettings().project,
            job_type="evaluate",
            group=content.benchmark[:MOST_CHARACTERS],
            name=f"{content.benchmark}: {model.name}"[:MOST_CHARACTERS],
            config={"benchmark": content.benchmark, "weights": model.weights}
            | {"lineage": model.lineage, "versions": content.versions},
            mode=cast(Any, resolve_mode(TrackingSettings())),
            settings=wandb.Settings(silent=True, console="off"),
        )
        used = wandb.Artifact(f"model-{model.weights[:16]}", "model", metadata=model.lineage)
        if run.offline:
            run.log_artifact(used)
        else:  # not exercised without a network
            run.use_artifact(used)
        run.log_artifact(_written(content, output))
        run.log({"numbers": _numbers(content, model)} | metrics_of_tasks(content, model))
        run.finish()
    wandb.teardown()  # its service ends here, and not at some moment of this process's end


def metrics_of_tasks(content: ReportContent, model: SubjectEntry) -> dict[str, float]:
    """Main metrics of a model under the names that they have in W&B."""
    metrics: dict[str, float] = {}
    for row in content.rows:
        if row["model"] == model.name and row["role"] == "main":
            name = f"bench/{row['task']}/{row['dataset']}/{row['metric']}"
            values = {name: row["value"], f"{name}/low": row["low"], f"{name}/high": row["high"]}
            metrics |= {key: value for key, value in values.items() if has(value)}
    return metrics


def _numbers(content: ReportContent, model: SubjectEntry) -> Any:
    import wandb

    columns = [*COLUMNS, "role"]
    rows = [
        [_plain(row, column) for column in columns]
        for row in content.rows
        if row["baseline"] or row["model"] == model.name
    ]
    return wandb.Table(columns=columns, data=rows)


def _plain(row: Row, column: str) -> Any:
    """A field as a table of W&B takes it: NaN is none."""
    value = row[column]
    return None if isinstance(value, float) and not has(value) else value


def _written(content: ReportContent, output: Path) -> Any:
    import wandb

    name = re.sub(r"[^\w.-]", "-", f"evaluation-{content.benchmark}-{output.name}", flags=re.ASCII)
    facts = {"command": content.command, "hardware": content.hardware}
    facts["folder"] = output.resolve().as_uri()
    artifact = wandb.Artifact(name[:MOST_CHARACTERS], "evaluation", metadata=facts)
    for file in FILES:
        if (output / file).is_file():
            artifact.add_file(str(output / file))
    return artifact
