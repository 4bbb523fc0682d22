"""Subjects that know the answers but for noise of known strength, and files of chains."""

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from draws import generator, random_sequence

STATES = "HGIEBTSC"


class Planted:
    """A subject whose answers are functions of the sequence."""

    name, digest, baseline = "planted", "0123", False

    def __init__(self, layers=2, **answers):
        self.layers = layers
        self.answers = answers
        """By kind, a function of the request."""
        self.kinds = frozenset(answers)

    @contextmanager
    def read(self, ask):
        self.asked = set(ask())
        yield self

    def get(self, request):
        if request not in self.asked:
            raise KeyError(request)
        return self.answers[request.reading.kind](request)


def measured(task, subject):
    """The task's outcome, and its values by metric and data set."""
    with subject.read(lambda: task.requests(subject)) as readings:
        outcome = task.measure(subject, readings)
    return outcome, {(m.metric, m.dataset): m.sample.value() for m in outcome.measures}


def coil(length, rng=None):
    """Cβ of a random chain, compact enough to touch itself, [L, 3] fp32."""
    rng = rng or generator()
    steps = rng.normal(size=(length, 3))
    steps /= np.linalg.norm(steps, axis=1, keepdims=True) / 3.8
    places = np.cumsum(steps, axis=0)
    return (places * min(1, 9 / places.std())).astype(np.float32)


def random_chains(count, shortest=40, longest=80, unresolved=0.02):
    """Rows of a file of chains: states persist for some residues, with some unknown."""
    rng = generator()
    rows = []
    for index in range(count):
        length = int(rng.integers(shortest, longest + 1))
        states = np.repeat(rng.choice(list(STATES), length, p=[0.3, *[0.1] * 7]), 4)[:length]
        states[rng.random(length) < 0.05] = "-"
        coordinates = coil(length, rng)
        coordinates[rng.random(length) < unresolved] = np.nan
        rows.append(
            {
                "id": f"chain{index}",
                "sequence": random_sequence(length),
                "ss8": "".join(states),
                "cb_angstrom": coordinates.ravel().tolist(),
            }
        )
    return rows


def write_chains(path, rows, group=7):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path
