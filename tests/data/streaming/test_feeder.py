"""What the feeder hands to whom, in this process: as many readers as there are calls."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from raptide.alphabet import ESM_33
from raptide.data.streaming import feeder as module
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.data.streaming.feeder import MOST_A_CALL, MOST_HELD, BatchReader, Feeder
from raptide.data.streaming.shares import unpack_shares
from raptide.errors import CorpusError, StreamStalled
from raptide.training.batches import micro_batches, share_bounds
from raptide.training.watching.audit import AuditWriter, read_audit

CPU = torch.device("cpu")


def a_batch(rng, number, rows, row_tokens):
    """Rows of two to five segments, the last ones not quite full."""
    tokens = np.full((rows, row_tokens), ESM_33.pad, np.uint8)
    segments = []
    for row in range(rows):
        cuts = rng.choice(np.arange(1, row_tokens), rng.integers(2, 6), replace=False)
        segments.append(np.diff(np.sort(cuts), prepend=0).astype(np.int32))
        tokens[row, : segments[-1].sum()] = rng.integers(4, 24, segments[-1].sum())
    chosen = (tokens != ESM_33.pad) & (rng.random(tokens.shape) < 0.15)
    targets = np.where(chosen, tokens, ESM_33.pad).astype(np.uint8)
    ids = np.stack([np.full(rows, 3), np.full(rows, number), np.arange(rows)], axis=1)
    return GlobalBatch(
        PackedRows(tokens, targets, segments), ids, Cursor(3, number, rows)
    ).counted()


def some_batches(count, rows, row_tokens=32):
    rng = np.random.default_rng(5)
    return [a_batch(rng, number, rows, row_tokens) for number in range(count)]


class Ready(Feeder):
    """A feeder whose batches are there, or anything else that can be iterated over."""

    def __init__(self, batches, readers, **options):
        super().__init__(None, Cursor(), 0, readers, **options)
        self._batches = iter(batches)


def test_readers_of_a_blind_model_are_asked_for_all_residues_of_the_whole_batch():
    (batch,) = some_batches(1, 8)
    feeder = Ready([batch], 4, blind=True)
    asked = 0
    for rank in range(4):
        (share,) = unpack_shares(feeder.fetch(rank, 0, 1))
        np.testing.assert_array_equal(
            share.rows.targets, batch.uncovered().rows.targets[2 * rank : 2 * rank + 2]
        )
        asked += np.count_nonzero(share.rows.targets != ESM_33.pad)
        assert share.num_targets == batch.num_tokens, "these have no special tokens"
    assert asked == batch.num_tokens > 3 * batch.num_targets


@pytest.mark.parametrize(("rows", "workers", "micro_rows"), [(2048, 1024, 1), (700, 1024, 1)])
def test_1024_readers_get_what_each_cut_of_the_whole_batch_before(rows, workers, micro_rows):
    """With fewer rows than ranks, some ranks have none."""
    accumulation = -(-rows // (workers * micro_rows))
    bounds = [
        share_bounds(rows, rank, workers, micro_rows, accumulation) for rank in range(workers)
    ]
    batches = some_batches(2, rows)
    feeder = Ready(batches, workers)
    ids = [[], []]
    for rank, own in enumerate(bounds):
        shares = unpack_shares(feeder.fetch(rank, 0, 2))
        for batch, share, seen in zip(batches, shares, ids, strict=True):
            for name in ("num_places", "num_tokens", "num_targets", "squared_lengths"):
                assert getattr(share, name) == getattr(batch, name)
            assert share.next_cursor == batch.next_cursor
            seen += share.row_ids.tolist()
            within = share_bounds(len(share.row_ids), 0, 1, micro_rows, accumulation)
            now = micro_batches(share.rows, within, ESM_33, CPU)
            before = micro_batches(batch.rows, own, ESM_33, CPU)
            for found, expected in zip(now, before, strict=True):
                assert found.packed.lengths == expected.packed.lengths
                assert found.packed.tokens_T.equal(expected.packed.tokens_T)
                assert found.targets.at_N.equal(expected.targets.at_N)
                assert found.targets.true_N.equal(expected.targets.true_N)
    assert ids == [batch.row_ids.tolist() for batch in batches]
    assert not feeder._held


def test_the_audit_does_not_depend_on_how_many_take_the_shares(tmp_path):
    batches = some_batches(3, 64)
    digests = set()
    for readers in (1, 2, 64):
        run = tmp_path / str(readers)
        run.mkdir()
        feeder = Ready(batches, readers)
        for rank in range(readers):
            writer = AuditWriter(run, rank, 1, print)
            for step, share in enumerate(unpack_shares(feeder.fetch(rank, 0, 3))):
                writer.write(step + 1, share)
            writer.close()
        audit = read_audit(run)
        assert (audit.steps, audit.rows) == (3, 3 * 64)
        digests.add(audit.digest)
    assert len(digests) == 1


def test_a_reader_is_sent_its_own_rows_and_little_else():
    rows, row_tokens, readers = 64, 1024, 32
    feeder = Ready(some_batches(4, rows, row_tokens), readers)
    one = 2 * row_tokens * rows // readers  # tokens and targets
    assert one < len(feeder.fetch(0, 0, 1)) < 1.1 * one
    assert 3 * one < len(feeder.fetch(0, 1, 3)) < 3.2 * one


def test_what_one_slow_reader_leaves_is_bounded_and_the_others_wait():
    produced = []

    def endless():
        batch = some_batches(1, 6)[0]
        while True:
            produced.append(1)
            yield batch

    feeder = Ready(endless(), 3)
    taken = [0, 0, 0]

    def ask(rank):
        taken[rank] += (
            len(unpack_shares(packed)) if (packed := feeder.fetch(rank, taken[rank], 5)) else 0
        )

    for _ in range(20):
        ask(0), ask(1)
    assert len(produced) == len(feeder._held) == MOST_HELD == taken[0]
    ask(2)
    ask(0)
    assert (taken[0], taken[2], len(feeder._held)) == (MOST_HELD + 5, 5, MOST_HELD)


def test_calls_that_come_in_several_threads_get_what_is_theirs():
    batches = some_batches(30, 64)

    def slow():
        for batch in batches:
            time.sleep(0.002)
            yield batch

    feeder = Ready(slow(), 32)

    def read(rank):
        ids = []
        while len(ids) < 30:
            packed = feeder.fetch(rank, len(ids), 5)
            ids += [share.row_ids.tolist() for share in unpack_shares(packed)] if packed else []
        return ids

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(read, range(32)))
    for number, batch in enumerate(batches):
        assert [row for ids in found for row in ids[number]] == batch.row_ids.tolist()


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_a_reader_that_asks_twice_or_out_of_order_is_told(asked):
    feeder = Ready(some_batches(5, 4), 2)
    feeder.fetch(1, 0, 2)
    with pytest.raises(AssertionError, match=rf"rank 1 asks for batch {asked}, but 2 is next"):
        feeder.fetch(1, asked, 1)
    assert len(unpack_shares(feeder.fetch(1, 2, 1))) == 1


def test_an_answer_does_not_wait_for_what_does_not_come_soon(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "GATHER_S", 2.5)
    feeder = Ready(some_batches(9, 4), 1)
    assert len(unpack_shares(feeder.fetch(0, 0, 9))) == 3


class Handle:
    """A feeder's handle: a call is answered at once, or when its answer is asked for."""

    def __init__(self, feeder, answers_late=lambda: False):
        self.calls = []

        def remote(*given):
            self.calls.append(given)
            if answers_late():
                return lambda: feeder.fetch(*given)
            answer = feeder.fetch(*given)
            return lambda: answer

        self.fetch = type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
def answered(monkeypatch):
    monkeypatch.setattr(module.ray, "get", lambda call, timeout: call())


def test_a_reader_has_one_call_on_its_way_and_asks_for_more_and_more(answered):
    batches = some_batches(40, 4)
    handle = Handle(Ready(batches, 1))
    shares = BatchReader(handle, 0, 60.0).shares(40)
    assert next(shares).row_ids.tolist() == batches[0].row_ids.tolist()
    assert handle.calls == [(0, 0, 1), (0, 1, 2)]
    assert [s.row_ids[0, 1] for s in shares] == list(range(1, 40))
    sizes = [most for _, _, most in handle.calls]
    assert sizes == [1, 2, 4, 8, MOST_A_CALL, MOST_A_CALL, 1]


def test_large_shares_come_one_by_one(answered):
    handle = Handle(Ready(some_batches(4, 64, 1024), 1))
    assert len(list(BatchReader(handle, 0, 60.0).shares(4))) == 4
    assert [most for _, _, most in handle.calls] == [1, 1, 1, 1]


def test_readers_that_train_in_step_are_never_too_far_ahead(answered, monkeypatch):
    """None is more than a step and three shares on their way ahead of the last."""
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("a reader was kept waiting"))
    draw = random.Random(3)
    feeder = Ready(some_batches(200, 8), 4)
    handle = Handle(feeder, answers_late=lambda: draw.random() < 0.5)
    readers = [BatchReader(handle, rank, 60.0).shares(200) for rank in range(4)]
    taken = [0] * 4
    while min(taken) < 200:
        rank = draw.choice([r for r in range(4) if taken[r] < min(200, min(taken) + 4)])
        next(readers[rank])
        taken[rank] += 1
        assert len(feeder._held) <= MOST_HELD


def test_a_reader_too_far_ahead_goes_on_once_the_last_one_does(answered, monkeypatch):
    feeder = Ready(some_batches(60, 4), 2)
    ahead = BatchReader(Handle(feeder), 0, 60.0).shares(60)
    behind = BatchReader(Handle(feeder), 1, 60.0).shares(60)
    slept = []
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (slept.append(seconds), next(behind)))
    assert [share.row_ids[0, 1] for share in ahead] == list(range(60))
    assert slept


def test_a_reader_that_waits_too_long_for_another_says_for_which_batch(answered, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 1.0))
    feeder = Ready(some_batches(60, 4), 2)
    with pytest.raises(StreamStalled, match=r"Rank 0 waited 60 s for a rank that .* batch 0;"):
        list(BatchReader(Handle(feeder), 0, 60.0).shares(60))
    assert feeder._produced == MOST_HELD


def test_an_error_comes_in_place_of_its_batch_whatever_is_asked_for():
    def broken_off():
        yield from some_batches(3, 4)
        raise CorpusError("row group 7 is damaged.")

    feeder = Ready(broken_off(), 2)
    for rank in (0, 1):
        assert len(unpack_shares(feeder.fetch(rank, 0, 8))) == 3
        for _ in range(2):
            with pytest.raises(CorpusError, match="row group 7"):
                feeder.fetch(rank, 3, 8)
