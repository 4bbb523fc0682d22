"""Ranks that train together make the same passes, whatever becomes of a loss on one of them."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def test_a_loss_that_is_no_number_on_one_rank_makes_no_other_passes_than_the_rest(tmp_path):
    """At ZeRO 3 every pass gathers the weights from all ranks: one more, and they wait for ever."""
    command = [sys.executable, str(ROOT / "tests/support/two_ranks.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [each[kind]["passes"] for each in told for kind in ("empty", "broken")] == [4] * 4
    for each in told:
        first, second = each["broken"]["results"]
        assert first["left_out"] > 0
        assert second["left_out"] == 0
        expected = each["empty"]["results"][0]["grad_norm"]
        assert first["grad_norm"] == pytest.approx(expected)
    assert told[0]["broken"] == told[1]["broken"]
    assert told[0]["farthest"] < 1e-6
    assert told[0]["farthest_at_start"] == 0, "made in parts, and the same"
    assert [each["farthest_from_mean"] for each in told] == [0, 0]
