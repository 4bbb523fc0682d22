"""Results are kept whole or not at all, and by all that they depend on."""

from __future__ import annotations

import numpy as np
import pytest
from draws import generator

from raptide.errors import RaptideError
from raptide.evaluation.cache import Measured, Result, ResultCache, key_of
from raptide.evaluation.results import Heatmap, Lines, Measure, Points
from raptide.evaluation.samples import Ratio


def some_result():
    rng = generator()
    sample = Ratio(rng.random(50), np.ones(50), exp=True)
    measure = Measure("ece", "held<out>", sample, False, "main", 3)
    return Result(
        [Measured(measure, sample.value(), 1.0, 2.5)],
        ["3 chains were left out: ü"],
        [
            Lines("curves", "x", "y", [0.0, 1.0], {"a": [1.0, float("nan")]}, ["p", "q"]),
            Heatmap("map", rng.random((4, 5)).astype(np.float32), None, ["r"] * 4),
            Points("cloud", rng.random((7, 2)).astype(np.float32), list("aabbccd")),
        ],
        1.25,
    )


def test_a_result_comes_back_as_it_was(tmp_path):
    cache, kept = ResultCache(tmp_path), some_result()
    cache.keep("k", kept)
    found = cache.find("k")
    assert found.notes == kept.notes
    assert found.seconds == kept.seconds
    (mine,), (theirs,) = kept.measured, found.measured
    assert (theirs.value, theirs.low, theirs.high) == (mine.value, mine.low, mine.high)
    assert theirs.measure.sample.value() == mine.value
    for name in ("metric", "dataset", "higher_is_better", "role", "layer"):
        assert getattr(theirs.measure, name) == getattr(mine.measure, name)
    lines, heatmap, points = found.figures
    assert repr(lines) == repr(kept.figures[0])
    np.testing.assert_array_equal(heatmap.values, kept.figures[1].values)
    assert heatmap.truth is None
    np.testing.assert_array_equal(points.xy, kept.figures[2].xy)
    assert found.main() is found.measured[0]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_counts_as_missing(tmp_path, share):
    cache = ResultCache(tmp_path)
    cache.keep("k", some_result())
    whole = (tmp_path / "k.npz").read_bytes()
    (tmp_path / "k.npz").write_bytes(whole[: int(len(whole) * share)])
    assert cache.find("k") is None
    cache.keep("k", some_result())
    assert cache.find("k") is not None


def test_a_changed_byte_is_no_other_number(tmp_path):
    cache = ResultCache(tmp_path)
    cache.keep("k", some_result())
    whole = bytearray((tmp_path / "k.npz").read_bytes())
    value = cache.find("k").measured[0].value
    for place in generator().integers(0, len(whole), 60):
        damaged = whole.copy()
        damaged[place] ^= 0x55
        (tmp_path / "k.npz").write_bytes(bytes(damaged))
        found = cache.find("k")
        assert found is None or found.measured[0].value == value


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "k.npz", facts=np.array([{"format": 1}], dtype=object))
    assert ResultCache(tmp_path).find("k") is None


def test_keys_tell_everything_apart():
    parts = ["model", "digest", {"layers": [1, 2], "train": None}, 1, "data"]
    assert key_of(*parts) == key_of(*parts)
    for place in range(len(parts)):
        others = [*parts]
        others[place] = {"layers": [1, 3]} if place == 2 else "other"
        assert key_of(*others) != key_of(*parts)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with (
            pytest.raises(RaptideError, match=r"cannot be written .*give another --cache"),
            ResultCache(folder).turn("0" * 64),
        ):
            pass


def test_a_turn_ends_with_its_block_whatever_happens_in_it(tmp_path):
    cache, waited = ResultCache(tmp_path), []
    with pytest.raises(KeyboardInterrupt), cache.turn("0" * 64):
        raise KeyboardInterrupt
    with cache.turn("0" * 64, lambda: waited.append(1)), cache.turn("1" * 64):
        assert not waited, "another subject's turn is another's"
    assert not list(tmp_path.iterdir())
