"""What a person is told of a job: the bar while it goes on, and the lines at its end."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow.compute as pc
from tqdm import tqdm

from raptide.bulk.folder import PARTS, REJECTS_FILE, OutputFolder
from raptide.bulk.job import Outcome, Watch

HOUR_S = 3600
MILLION = 1_000_000


@contextmanager
def progress_bar() -> Iterator[Watch]:
    """Residues done of all there are, residues/s, and the time that is left."""
    bar: Any = None

    def watch(done: int, total: int, rate: float) -> None:
        nonlocal bar
        if bar is None:
            columns = shutil.get_terminal_size().columns
            bar = tqdm(
                total=total, initial=done, unit=" residues", unit_scale=True, ncols=columns - 1
            )
        bar.update(done - bar.n)

    try:
        yield watch
    finally:
        if bar is not None:
            bar.close()


def describe(
    outcome: Outcome, output: OutputFolder, price_per_hour: float | None, things: str = "proteins"
) -> str:
    """The end of a job, in a few lines; `things` is what its records are."""
    lines = [
        f"{outcome.rows:,} rows in {outcome.parts:,} parts, of {outcome.residues:,} residues given",
        f"  {output.path(PARTS)}",
    ]
    if outcome.rejects:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in count_reasons(output).most_common())
        lines += [
            f"{outcome.rejects:,} records rejected: {kinds}",
            f"  {output.path(REJECTS_FILE)}",
        ]
    if not outcome.computed_records:
        return "\n".join([*lines, f"Nothing was left to compute ({outcome.startup_s:.1f} s)"])
    seconds = max(outcome.seconds, 1e-9)
    device = "GPU" if outcome.on_gpus else "CPU"
    engines = f"{outcome.workers} {device} engine{'s' if outcome.workers > 1 else ''}"
    lines.append(
        f"{outcome.computed_residues / seconds:,.0f} residues/s and "
        f"{outcome.computed_records / seconds:,.1f} {things}/s on {engines}, "
        f"{seconds:,.1f} s after {outcome.startup_s:,.1f} s of start-up"
    )
    if price_per_hour is not None:
        hours = MILLION * seconds / outcome.computed_records / HOUR_S
        lines.append(
            f"A million such {things}: {hours:,.2f} hours, {hours * price_per_hour:,.2f} at "
            f"{price_per_hour:g} an hour"
        )
    return "\n".join(lines)


def count_reasons(output: OutputFolder) -> Counter[str]:
    """How many records were rejected for each kind of reason."""
    kinds: Counter[str] = Counter()
    with output.open_table(REJECTS_FILE) as rejects:
        groups = rejects.num_row_groups
    for group in range(groups):
        reasons = partial(_reasons_of, group=group)
        table = output.read_in(REJECTS_FILE, reasons)
        counts = pc.value_counts(pc.list_element(pc.split_pattern(table["reason"], ":"), 0))
        kinds.update({each["values"]: each["counts"] for each in counts.to_pylist()})
    return kinds


def _reasons_of(file: Any, group: int) -> Any:
    return file.read_row_group(group, ["reason"])
