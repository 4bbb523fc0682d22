"""Rows by bucket, with few objects for the driver to hold."""

import gc
import time

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
from ray.remote_function import RemoteFunction

from raptide.data.building import shuffle as shuffle_module
from raptide.data.building.shuffle import range_bucket, shuffle
from raptide.errors import CorpusError, plain_errors

BLOCKS, ROWS = 30, 500


def hashes_of(block):
    return np.random.default_rng(block).integers(0, 2**64 - 1, ROWS, np.uint64)


def some_rows():
    hashes = [hashes_of(block) for block in range(BLOCKS)]

    # Within this function, since Ray's workers do not find this module.
    def rows_of(block):
        found = hashes[int(block["item"][0])]
        yield pa.table({"hash": found, "text": [str(value) for value in found]})

    blocks = ray.data.from_items(list(range(BLOCKS)), override_num_blocks=BLOCKS)
    return blocks.map_batches(rows_of, batch_size=1)


def shuffled(buckets):
    """All rows, as they come, with the bucket that they were in; each has its text still."""

    def place(table):
        return range_bucket(table["hash"], buckets)

    def sort(bucket, table):
        assert set(place(table)) == {bucket}
        assert table["text"].to_pylist() == [str(value) for value in table["hash"].to_pylist()]
        return table.sort_by("hash").append_column("bucket", pa.array([bucket] * len(table)))

    return pa.concat_tables(ray.get(shuffle(some_rows(), buckets, place, sort)))


@pytest.fixture
def objects(monkeypatch, cluster):
    """How many objects each task was to make that this process has started."""
    counts = []
    start = RemoteFunction._remote

    def count(self, *args, **options):
        made = start(self, *args, **options)
        counts.append(len(made) if isinstance(made, list) else 1)
        return made

    monkeypatch.setattr(RemoteFunction, "_remote", count)
    return counts


@pytest.mark.parametrize("buckets", [1, 20, 200])
def test_each_bucket_is_called_once_with_all_its_rows(cluster, monkeypatch, buckets):
    """In one go, by one cut and by two."""
    monkeypatch.setattr(shuffle_module, "INPUT_BATCH_BYTES", 100_000)
    found = shuffled(buckets)
    expected = np.sort(np.concatenate([hashes_of(block) for block in range(BLOCKS)]))
    assert found["hash"].to_pylist() == expected.tolist()
    assert found["bucket"].to_pylist() == sorted(found["bucket"].to_pylist())


def test_many_buckets_do_not_make_many_objects(objects, monkeypatch):
    """All of them, and the small ones whole, are in the driver's heap."""
    monkeypatch.setattr(shuffle_module, "INPUT_BATCH_BYTES", 20_000)
    assert len(shuffled(200)) == BLOCKS * ROWS
    assert len(objects) > BLOCKS + 200, "the shuffle's tasks should be among those counted"
    assert sum(objects) < BLOCKS * 200 / 3


def test_an_error_is_raised_as_itself_and_starts_no_more_tasks(objects):
    def refuse(bucket, table):
        raise CorpusError("no bucket will do.")

    def place(table):
        return range_bucket(table["hash"], 60)

    with pytest.raises(CorpusError, match=r"^no bucket will do\."), plain_errors():
        shuffle(some_rows(), 60, place, refuse)
    assert 0 < objects.count(2) < 60


def test_of_tasks_that_fail_together_none_outlives_the_error(cluster, tmp_path, monkeypatch):
    """Nor does the driver die, as it did where they were cancelled while they ended; and of all but
    the first, Ray prints nothing."""

    printed = []
    monkeypatch.setattr(ray._private.worker, "_unhandled_error_handler", printed.append)

    def refuse(bucket, table):
        (tmp_path / f"{bucket}.begun").touch()
        time.sleep(0.002 * (bucket % 7))
        (tmp_path / f"{bucket}.ended").touch()
        raise CorpusError("the disk is full.")

    def place(table):
        return range_bucket(table["hash"], 60)

    for _ in range(10):
        with pytest.raises(CorpusError, match=r"^the disk is full\."), plain_errors():
            shuffle(some_rows(), 60, place, refuse)
        begun, ended = (
            {each.stem for each in tmp_path.glob(f"*.{end}")} for end in ("begun", "ended")
        )
        assert begun == ended
    gc.collect()
    time.sleep(1)  # Ray would print once nobody holds what came of a task
    assert not printed


@pytest.mark.parametrize("buckets", [1, 3, 100])
def test_of_no_rows_nothing_is_made(cluster, buckets):
    none = some_rows().map_batches(lambda table: table.slice(0, 0), batch_format="pyarrow")
    assert shuffle(none, buckets, lambda table: np.zeros(len(table)), lambda *_: None) == []
