"""Sequences longer than a model takes."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from draws import random_sequence, random_weights
from hypothesis import given
from hypothesis import strategies as st

from raptide.calls.windows import cut_windows, window_around, window_starts
from raptide.errors import SequenceError
from raptide.inference import forward
from raptide.inference.engine import Engine


@given(st.data())
def test_windows_cover_everything_with_weights_that_sum_to_one(data):
    size = data.draw(st.integers(1, 40))
    length = data.draw(st.integers(size + 1, 400))
    windows = list(cut_windows(0, length, size, size))
    total = np.zeros(length)
    for window in windows:
        assert window.stop - window.start == size
        assert (window.weights > 0).all()
        total[window.start : window.stop] += window.weights
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    starts = window_starts(length, size)
    assert starts[0] == 0
    assert starts[-1] == length - size
    assert max(np.diff(starts)) <= max(1, size // 2)
    assert sum(window.share for window in windows) == pytest.approx(1)


@given(st.integers(1, 50), st.data())
def test_a_masked_position_lies_in_its_window_as_central_as_the_ends_allow(size, data):
    length = data.draw(st.integers(size, 300))
    position = data.draw(st.integers(0, length - 1))
    start = window_around(position, length, size)
    assert 0 <= start <= position < start + size <= length
    if size // 2 <= position <= length - size:
        assert position - start == size // 2


@pytest.fixture(scope="module")
def engine():
    """ESM-1b with places for 40 residues."""
    weights = random_weights(family="esm1b", layers=2, width=32, heads=4, max_positions=42)
    return Engine(weights.build(), {}, torch.device("cpu"), 128)


def by_hand(engine, sequence, numbers):
    """Weighted mean of `numbers` (a sequence's [L, D]) over the windows."""
    total = 0
    for window in cut_windows(0, len(sequence), 40, 40):
        part = np.zeros((len(sequence), numbers("AA").shape[1]))
        part[window.start : window.stop] = window.weights[:, None] * numbers(
            sequence[window.start : window.stop]
        )
        total = total + part
    return total


def test_windows_give_the_weighted_mean_of_what_each_gives_alone(engine):
    long, short = random_sequence(133), random_sequence(40)
    expected = by_hand(engine, long, lambda s: engine.embed([s], pooling="residue")[0])
    residue = engine.embed([short, long], pooling="residue", long="window")
    np.testing.assert_allclose(residue[1], expected, atol=1e-5)
    mean = engine.embed([long, short], long="window")
    np.testing.assert_allclose(mean[0], expected.mean(0), atol=1e-5)
    np.testing.assert_allclose(mean[1], engine.embed([short])[0], atol=1e-5)
    logits = by_hand(engine, long, lambda s: engine.logits([s])[0])
    np.testing.assert_allclose(engine.logits([long], long="window")[0], logits, atol=1e-4)
    windows = cut_windows(0, 133, 40, 40)
    first = np.mean([engine.embed([long[w.start : w.stop]], pooling="bos") for w in windows], 0)
    np.testing.assert_allclose(engine.embed([long], pooling="bos", long="window"), first, atol=1e-5)


def test_a_masked_position_is_seen_in_a_window_of_its_own(engine):
    sequence = random_sequence(133)
    position = 70
    start = window_around(position, 133, 40)
    piece = sequence[start : start + 40]
    old = sequence[position]
    new = "W" if old != "W" else "C"
    expected = engine.score_variants(
        piece, [f"{old}{position - start + 1}{new}"], "masked-marginals"
    )
    scores = engine.score_variants(
        sequence, [f"{old}{position + 1}{new}"], "masked-marginals", long="window"
    )
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_rotary_models_take_longer_sequences_whole_up_to_a_stated_limit(monkeypatch):
    weights = random_weights(layers=2, width=32, heads=4)
    engine = Engine(weights.build(), {}, torch.device("cpu"), 4096)
    assert engine.max_residues == 16384
    sequence = random_sequence(3000)
    whole = engine.embed([sequence])
    np.testing.assert_allclose(engine.embed([sequence], long="window"), whole, atol=1e-6)
    monkeypatch.setattr(forward, "LONGEST_RESIDUES", 2000)
    with pytest.raises(SequenceError, match="at most 2000 residues"):
        engine.embed([sequence])
    assert np.isfinite(engine.embed([sequence], long="window")).all()


@pytest.mark.parametrize("family", ["esm1", "esm1b", "esm2"])
@pytest.mark.thorough
def test_30000_residues_neither_crash_nor_exhaust_memory(family):
    """In a process of its own, so that its peak memory is its own."""
    script = f"""
        import resource, sys
        import numpy as np, torch
        from raptide.inference.engine import Engine
        from raptide.model.config import ModelSettings
        from raptide.model.transformer import Esm

        settings = ModelSettings(family={family!r}, layers=2, width=64, heads=4)
        engine = Engine(Esm(settings).initialise(1).eval(), {{}}, torch.device("cpu"), 4096)
        sequence = "".join(np.random.default_rng(1).choice(list("LAGVSERTIDPKQNFYMHWC"), 30_000))
        engine.embed([sequence[:1000]])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        embedded = engine.embed([sequence], pooling="residue", long="window")[0]
        assert embedded.shape == (30_000, 64) and np.isfinite(embedded).all()
        table = engine.scan(sequence, long="window")
        assert table.shape == (30_000, 20) and np.isfinite(table).all()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300_000, "kB more than at 1,000 residues"


def test_windows_do_not_depend_on_the_batch(engine):
    sequences = [random_sequence(n) for n in (90, 133, 40, 12)]
    together = engine.embed(sequences, long="window")
    alone = np.concatenate([engine.embed([s], long="window") for s in sequences])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert torch.is_grad_enabled()
