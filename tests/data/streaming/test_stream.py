import dataclasses
import hashlib
import time
from itertools import islice

import numpy as np
import pytest
import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

from raptide.alphabet import ESM_33
from raptide.data.streaming import pace
from raptide.data.streaming import stream as stream_module
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows, StreamSettings
from raptide.data.streaming.feeder import ACTOR, BatchReader, Feeder, FeederActor
from raptide.data.streaming.pace import REST_S, Pace
from raptide.data.streaming.stream import (
    Source,
    StreamPlan,
    describe_difference,
    global_batches,
    prepare_rows,
)
from raptide.errors import CorpusError
from raptide.training.batches import share_bounds

SETTINGS = StreamSettings(row_tokens=512, crop_tokens=256, batch_rows=24, seed=5)


@pytest.fixture(scope="module")
def plan(corpus):
    return StreamPlan((Source(str(corpus.path), corpus.digest),), SETTINGS, "esm-33")


@pytest.fixture(scope="module")
def epochs_of_rows(plan, corpus):
    """The first epochs, prepared one block after the other without Ray: what must come."""
    blocks = len(plan.training_blocks(corpus))
    return [
        ((epoch, position, row), rows.tokens[row], rows.targets[row], rows.segments[row])
        for epoch in range(3)
        for position in range(blocks)
        for rows in [prepare_rows(plan, epoch, position)]
        for row in range(len(rows.tokens))
    ]


@pytest.fixture(scope="module")
def batches(plan, epochs_of_rows):
    count = len(epochs_of_rows) // SETTINGS.batch_rows
    return list(global_batches(plan, Cursor(), count))


def digest(batch):
    parts = [batch.rows.tokens, batch.rows.targets, batch.row_ids, *batch.rows.segments]
    return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()


def joined(shares):
    """The shares of all ranks as one."""
    rows = PackedRows(
        np.concatenate([share.rows.tokens for share in shares]),
        np.concatenate([share.rows.targets for share in shares]),
        [segments for share in shares for segments in share.rows.segments],
    )
    ids = np.concatenate([share.row_ids for share in shares])
    return GlobalBatch(rows, ids, shares[0].next_cursor)


def test_ray_data_gives_the_rows_of_the_pure_function_in_order(batches, epochs_of_rows):
    expected = iter(epochs_of_rows)
    for batch in batches:
        assert batch.rows.tokens.shape == (24, 512)
        for i in range(24):
            row_id, tokens, targets, segments = next(expected)
            assert tuple(batch.row_ids[i]) == row_id
            assert (batch.rows.tokens[i] == tokens).all()
            assert (batch.rows.targets[i] == targets).all()
            assert (batch.rows.segments[i] == segments).all()


def test_batches_cross_from_one_epoch_into_the_next(batches):
    crossing = [b for b in batches if len(np.unique(b.row_ids[:, 0])) == 2]
    assert crossing, "choose other sizes: no batch straddles two epochs here"


def test_any_cursor_goes_on_with_the_very_next_batch(plan, batches):
    straddling = next(i for i, b in enumerate(batches) if len(np.unique(b.row_ids[:, 0])) == 2)
    for index in (0, straddling - 1, straddling):
        resumed = global_batches(plan, batches[index].next_cursor, 3)
        assert [digest(b) for b in resumed] == [digest(b) for b in batches[index + 1 : index + 4]]


GROWING = SETTINGS.model_copy(update={"first_batch_rows": 5, "batch_warmup_steps": 4})


def test_growing_batches_are_the_same_rows_cut_otherwise(plan, batches):
    """Whole, from any batch on, and through a feeder, whose answers hold equal batches."""
    growing = dataclasses.replace(plan, settings=GROWING)
    sizes = [5, 9, 14, 19, 24, 24, 24]
    assert [GROWING.rows_at(number) for number in range(7)] == sizes
    assert [GROWING.rows_before(number) for number in (0, 1, 3, 4, 7)] == [0, 5, 28, 47, 119]
    found = list(global_batches(growing, Cursor(), 7))
    assert [len(batch.row_ids) for batch in found] == sizes
    same = [row for batch in batches[:5] for row in batch.row_ids.tolist()]
    assert [row for batch in found for row in batch.row_ids.tolist()] == same[: sum(sizes)]
    for first in (1, 3, 5):
        cursor = found[first - 1].next_cursor
        resumed = global_batches(growing, cursor, 7 - first, first=first)
        assert [digest(batch) for batch in resumed] == [digest(batch) for batch in found[first:]]
    feeder = FeederActor.remote(growing, found[0].next_cursor, 6, 3, first=1)
    readers = [BatchReader(feeder, rank, 60.0).shares(6) for rank in range(3)]
    for expected in found[1:]:
        shares = [next(reader) for reader in readers]
        assert digest(joined(shares)) == digest(expected)
        rows = [len(share.row_ids) for share in shares]
        assert max(rows) - min(rows) <= 1


def test_growth_is_part_of_what_fixes_a_stream_and_its_absence_is_not(plan):
    """Checkpoints of runs that are older than these settings go on."""
    assert not {"first_batch_rows", "batch_warmup_steps"} & plan.fingerprint().keys()
    growing = dataclasses.replace(plan, settings=GROWING).fingerprint()
    told = describe_difference(plan.fingerprint(), growing)
    assert told == "first_batch_rows: None -> 5"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing_in_a_global_batch(plan, batches, workers):
    accumulation = -(-24 // (5 * workers))
    bounds = [share_bounds(24, rank, workers, 5, accumulation) for rank in range(workers)]
    feeder = FeederActor.remote(plan, Cursor(), 5, workers)
    readers = [BatchReader(feeder, rank, 60.0).shares(5) for rank in range(workers)]
    for expected in batches[:5]:
        shares = [next(reader) for reader in readers]
        assert digest(joined(shares)) == digest(expected)
        assert {share.next_cursor for share in shares} == {expected.next_cursor}
        assert {share.num_targets for share in shares} == {expected.num_targets}
        seen = [row for each in bounds for first, last in each for row in range(first, last)]
        assert seen == list(range(24)), "the shares cut the batch into each row once"


def test_a_fraction_is_a_prefix_of_the_blocks(plan, corpus):
    blocks = corpus.blocks("train")
    for percent in (1, 25, 50, 70):
        settings = SETTINGS.model_copy(update={"fraction": percent / 100})
        part = StreamPlan(plan.sources, settings, "esm-33")
        assert part.training_blocks(corpus) == blocks[: -(-len(blocks) * percent // 100)]


def test_no_held_out_residue_is_ever_streamed(corpus, epochs_of_rows):
    heldout = set()
    for block in corpus.blocks("heldout"):
        rows = corpus.read_block(block)
        for a, b in zip(rows.residue_splits, rows.residue_splits[1:], strict=False):
            heldout.add(rows.residues[a:b].tobytes())
    seen = 0
    for _, tokens, targets, segments in epochs_of_rows:
        true = np.where(targets == ESM_33.pad, tokens, targets)
        for segment in np.split(true[: segments.sum()], np.cumsum(segments)[:-1]):
            if segment[0] == ESM_33.cls and segment[-1] == ESM_33.eos:
                seen += 1
                assert segment[1:-1].tobytes() not in heldout
    assert seen > 1000


def test_the_fingerprint_names_what_differs(plan):
    settings = SETTINGS.model_copy(update={"seed": 6, "lookahead_mb": 99})
    other = StreamPlan(plan.sources, settings, "esm-33")
    assert describe_difference(plan.fingerprint(), other.fingerprint()) == "seed: 5 -> 6"
    assert describe_difference(plan.fingerprint(), plan.fingerprint()) is None


def test_ray_data_rests_while_nobody_waits_for_rows(plan, batches, monkeypatch):
    steps = 0
    rest = Pace.on_execution_step

    def counted(self, executor):
        nonlocal steps
        rest(self, executor)
        steps += 1

    monkeypatch.setattr(Pace, "on_execution_step", counted)
    stream = global_batches(plan, Cursor(), 100_000)
    assert digest(next(stream)) == digest(batches[0])
    before = steps
    assert before > 0
    time.sleep(4 * REST_S)
    assert steps - before <= 5
    assert digest(next(stream)) == digest(batches[1])
    stream.close()
    assert Pace not in ray.data.DataContext.get_current().execution_callback_classes


def test_no_more_tasks_are_listed_than_will_soon_be_wanted(cluster, plan, batches, monkeypatch):
    """Ray Data would list a whole plan while its reader takes its time."""
    monkeypatch.setattr(stream_module, "TASK_RESIDUES", 1)  # a task for each block
    monkeypatch.setattr(pace, "MOST_QUEUED", 8)
    monkeypatch.setattr(pace, "REST_S", 0.005)
    queued, rest = [], Pace.on_execution_step

    def looked(self, executor):
        queued.append(max(s.total_enqueued_input_blocks() for s in executor._topology.values()))
        rest(self, executor)

    monkeypatch.setattr(Pace, "on_execution_step", looked)
    few = StreamSettings(**SETTINGS.model_dump() | {"lookahead_mb": 16})
    stream = global_batches(StreamPlan(plan.sources, few, "esm-33"), Cursor(), 100_000)
    for index, expected in enumerate(batches[:4]):
        assert digest(next(stream)) == digest(expected)
        until = time.monotonic() + 120
        while len(queued) < 50 * (index + 1):
            assert time.monotonic() < until, len(queued)
            time.sleep(0.05)
    stream.close()
    assert max(queued) <= 8 + 2


def claims():
    """Who claims CPUs of the cluster."""
    coordinator = get_or_create_autoscaling_coordinator()
    return set(ray.get(coordinator.__ray_call__.remote(lambda self: list(self._ongoing_reqs))))


def test_a_feeder_in_place_of_one_that_was_killed_claims_what_that_one_did(plan):
    """The one that was killed would keep its CPUs for three minutes, and leave it none."""
    before, digests = claims(), set()
    for _ in range(2):
        feeder = FeederActor.remote(plan, Cursor(), 100_000, 1, run="some-run")
        (share,) = islice(BatchReader(feeder, 0, 60).shares(100_000), 1)
        digests.add(digest(share))
        assert claims() - before == {"raptide-some-run-0"}
        ray.kill(feeder)
    assert len(digests) == 1


def test_where_one_plan_ends_the_next_one_claims(cluster, plan, batches, monkeypatch):
    monkeypatch.setattr(stream_module, "PLAN_TASKS", 1)
    monkeypatch.setattr(stream_module, "TASK_RESIDUES", 1)  # a plan of one block
    monkeypatch.setattr(pace, "_claims", None)
    pace.claim_as("another-run")
    names, before = [], claims()
    monkeypatch.setattr(pace, "_claims", (names.append(name) or name for name in pace._claims))
    stream = global_batches(plan, Cursor(), len(batches))
    for expected in islice(batches, 4):
        assert digest(next(stream)) == digest(expected)
    stream.close()
    assert names[:3] == [f"raptide-another-run-{index}" for index in (0, 1, 0)]
    until = time.monotonic() + 30
    while claims() - before:  # a loop that has ended takes back what it claimed, in its own time
        assert time.monotonic() < until, claims()
        time.sleep(0.1)


def test_several_tasks_fit_into_what_may_lie_ahead(plan):
    rows = prepare_rows(plan, 0, 0)
    a_residue = stream_module._to_table(rows, 0, 0).nbytes / rows.tokens.size
    assert a_residue == pytest.approx(stream_module.RESIDUE_BYTES, rel=0.3)
    for lookahead_mb, residues in ((16, 500_000), (256, stream_module.TASK_RESIDUES)):
        settings = SETTINGS.model_copy(update={"lookahead_mb": lookahead_mb})
        assert stream_module._task_residues(settings) == pytest.approx(residues, rel=1e-3)


@pytest.mark.timeout(240)
def test_batches_that_are_large_for_what_may_lie_ahead_do_not_wait(cluster, plan, monkeypatch):
    """Their reader holds so much that Ray Data goes on by its escape hatch alone."""
    monkeypatch.setattr(pace, "RELEASE_S", 3600.0)
    digests = []
    for lookahead_mb in (16, 256):
        large = {"row_tokens": 1024, "batch_rows": 2000, "lookahead_mb": lookahead_mb}
        settings = SETTINGS.model_copy(update=large)
        stream = global_batches(StreamPlan(plan.sources, settings, "esm-33"), Cursor(), 100_000)
        digests.append([digest(next(stream)) for _ in range(3)])
        stream.close()
    assert digests[0] == digests[1]


def test_another_corpus_at_the_same_path_is_refused(plan):
    other = StreamPlan((Source(plan.sources[0].path, "0" * 64),), SETTINGS, "esm-33")
    with pytest.raises(CorpusError, match="all nodes must see one corpus"):
        prepare_rows(other, 0, 0)


def test_the_batches_before_an_error_come_to_every_reader(cluster, batches):
    def broken_off():
        yield from batches[:6]
        raise CorpusError("shard, row group 7 is damaged.")

    class BreaksOff(Feeder):
        def __init__(self):
            super().__init__(None, Cursor(), 0, 2)
            self._batches = broken_off()

    feeder = ray.remote(**ACTOR)(BreaksOff).remote()
    readers = [BatchReader(feeder, rank, 60.0).shares(100) for rank in range(2)]
    for batch in batches[:6]:
        assert digest(joined([next(reader) for reader in readers])) == digest(batch)
    for reader in readers:
        with pytest.raises(CorpusError, match="row group 7"):
            next(reader)


def test_a_damaged_block_stops_the_stream_with_its_name(corpus, tmp_path):
    import shutil

    copy = tmp_path / "corpus"
    shutil.copytree(corpus.path, copy)
    shard = copy / corpus.manifest["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes()[:5000])
    plan = StreamPlan((Source(str(copy), corpus.digest),), SETTINGS, "esm-33")
    feeder = FeederActor.remote(plan, Cursor(), 3, 2)
    for rank in range(2):  # every reader is told the same
        with pytest.raises(CorpusError, match=f"{shard.name}, row group") as caught:
            list(islice(BatchReader(feeder, rank, 60.0).shares(3), 3))
        assert "\n" not in str(caught.value)
