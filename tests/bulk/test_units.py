"""Where units end: by what a source holds, however it arrives."""

import numpy as np
import pytest
from budgets import examples
from hypothesis import given
from hypothesis import strategies as st

from raptide.bulk import units
from raptide.bulk.units import Cutter, Unit


class Costly:
    """Tokens and bytes out that are no multiples of each other; an empty record costs none."""

    def tokens(self, residues):
        return (residues + 2) * residues

    def output_bytes(self, residues):
        return residues * 7


BOUNDS = {"LEAST_TOKENS": 300, "MOST_TOKENS": 2000, "GROWTH": 4, "MOST_RECORDS": 9}
BOUNDS |= {"MOST_OUTPUT_BYTES": 400, "MOST_INPUT_BYTES": 150}


@pytest.fixture
def small(monkeypatch):
    for name, value in BOUNDS.items():
        monkeypatch.setattr(units, name, value)


def cut(lengths, extra, stops):
    """Where units begin, given the records in pieces that end at `stops`."""
    cutter, found, start = Cutter(Costly()), [0], 0
    for stop in [*sorted(stops), len(lengths)]:
        piece = np.array(lengths[start:stop], np.int64)
        found += [start + end for end in cutter.ends(piece, piece + np.array(extra[start:stop]))]
        start = stop
    return found


@examples(300)
@given(
    st.lists(
        st.tuples(st.one_of(st.just(0), st.integers(0, 12), st.integers(0, 90)), st.integers(0, 9)),
        min_size=1,
        max_size=80,
    ),
    st.data(),
)
def test_units_do_not_depend_on_the_pieces_and_keep_within_bounds(small, records, data):
    lengths, extra = (list(column) for column in zip(*records, strict=True))
    stops = data.draw(st.lists(st.integers(0, len(lengths)), max_size=30))
    starts = cut(lengths, extra, [])
    assert cut(lengths, extra, stops) == starts == sorted(set(starts))
    before, sizes = 0, np.array(lengths, np.int64)
    costs = Costly().tokens(sizes), Costly().output_bytes(sizes), sizes + np.array(extra)
    for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True):
        most = min(max(before // 4, 300), 2000)
        limits = (most, 400, 150, 9)

        def fits(stop, start=start, limits=limits):
            held = [*(cost[start:stop].sum() for cost in costs), stop - start]
            return all(cost <= limit for cost, limit in zip(held, limits, strict=True))

        assert fits(stop) or stop == start + 1, "too large, and not for one record"
        if stop < len(lengths):
            assert not fits(stop + 1), "smaller than need be"
        before += int(costs[0][start:stop].sum())


@examples(100)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**11)), max_size=30))
def test_names_sort_as_the_input_and_are_file_names(places):
    made = [Unit(source, "ab" * 32, first, 1, 1, 0, 0, 1) for source, first in places]
    names = [unit.name for unit in sorted(made, key=lambda unit: (unit.source, unit.first))]
    assert names == sorted(names)
    assert all(set(name) <= set("0123456789abcdef-") for name in names)
    assert Unit(0, "ab" * 32, 0, 1, 1, 0, 0, 1).name != Unit(0, "ac" * 32, 0, 1, 1, 0, 0, 1).name
