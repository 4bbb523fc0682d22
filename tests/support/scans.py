"""Deep mutational scans made for tests, as files in either form, and subjects that know them."""

from __future__ import annotations

import csv
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raptide.alphabet import STANDARD


def make_target(length, seed=0):
    return "".join(np.random.default_rng(seed).choice(list(STANDARD), length))


def all_singles(target):
    return [
        f"{letter}{place + 1}{other}"
        for place, letter in enumerate(target)
        for other in STANDARD
        if other != letter
    ]


def write_parquet(path, target, mutants, scores, **facts):
    metadata = {"target_sequence": target, "assay": path.stem, **facts}
    table = pa.table({"mutant": mutants, "score": np.asarray(scores, float)})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def write_csv(path, rows, header=("mutant", "mutated_sequence", "DMS_score", "DMS_score_bin")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def mutate(target, mutant):
    letters = list(target)
    for part in mutant.split(":"):
        assert letters[int(part[1:-1]) - 1] == part[0]
        letters[int(part[1:-1]) - 1] = part[-1]
    return "".join(letters)


class Planted:
    """A subject that answers by functions of a request, by kind, and notes what it is asked."""

    baseline = False
    name = "planted"
    digest = "0" * 64

    def __init__(self, answers, layers=4):
        self.answers = answers
        self.kinds = frozenset(answers)
        self.layers = layers
        self.asked = {}

    @contextmanager
    def read(self, ask):
        self.asked = {request.key: request for request in ask()}
        yield self

    def get(self, request):
        return self.answers[self.asked[request.key].reading.kind](request)


def measure(task, subject):
    """What a task finds of a subject: the outcome, and values by metric and dataset."""
    with subject.read(lambda: task.requests(subject)) as readings:
        outcome = task.measure(subject, readings)
    values = {(each.metric, each.dataset): each.sample.value() for each in outcome.measures}
    assert len(values) == len(outcome.measures)
    return outcome, values


def sample_of(outcome, metric, dataset):
    (found,) = [m for m in outcome.measures if (m.metric, m.dataset) == (metric, dataset)]
    return found.sample
