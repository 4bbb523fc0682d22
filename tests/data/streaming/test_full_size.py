"""What 95,000 blocks cost a process: their table, and nothing besides."""

import tracemalloc

import cloudpickle
import numpy as np
import pytest
from full_size import BLOCKS, of_full_size

from raptide.data.corpus import Corpus
from raptide.data.streaming import letters
from raptide.data.streaming.batch import StreamSettings
from raptide.data.streaming.stream import Source, StreamPlan, open_plan, prepare_rows


def plan_of(corpus):
    return StreamPlan((Source(str(corpus.path), corpus.digest),), StreamSettings(), "esm-33")


@pytest.fixture(scope="module")
def full(corpus, tmp_path_factory):
    return of_full_size(corpus, tmp_path_factory.mktemp("full") / "corpus")


def test_a_block_takes_60_bytes_and_no_object(full):
    tracemalloc.start()
    try:
        opened = open_plan(plan_of(full))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (blocks,) = opened.blocks
    assert len(blocks) == BLOCKS
    assert blocks.nbytes < 60 * BLOCKS
    shards = len(full.manifest["shards"])
    assert shards > 5000
    # The mixture's two numbers a place, and what the manifest says of a shard.
    assert kept < 20 * BLOCKS + 600 * shards
    assert peak < 100 * BLOCKS


def test_blocks_are_a_list_that_is_made_as_it_is_read(full, corpus):
    blocks, few = full.blocks("train"), corpus.blocks("train")
    assert [blocks[place] for place in range(len(few))] == list(few)
    assert blocks[BLOCKS - 1] == blocks[-1] == few[(BLOCKS - 1) % len(few)]
    assert list(blocks[2:5]) == [blocks[2], blocks[3], blocks[4]]
    assert blocks[: len(few)] == few != blocks
    assert sum(block["residues"] for block in blocks) == blocks.residues
    with pytest.raises(IndexError):
        blocks[BLOCKS]


def test_the_tables_of_a_full_corpus_stand_every_check(full):
    full.verify()
    assert Corpus.open(full.path).digest == full.digest


def test_any_place_of_it_is_prepared(full):
    rows = prepare_rows(plan_of(full), 7, BLOCKS - 1)
    assert rows.tokens.shape[1] == 1024
    assert len(rows.tokens) > 1


class Counted(Exception):
    pass


def test_the_tasks_that_count_letters_are_sent_no_blocks(full, monkeypatch):
    sent = []

    class Range:
        def map_batches(self, function):
            sent.append(len(cloudpickle.dumps(function)))
            raise Counted

    monkeypatch.setattr(letters.ray.data, "range", lambda *_, **__: Range())
    with pytest.raises(Counted):
        letters.count_training(plan_of(full), 0)
    assert sent[0] < 10_000


def test_letters_of_a_large_corpus_are_those_of_its_first_blocks(corpus, monkeypatch):
    plan = plan_of(corpus)
    whole = letters.count_training(plan, 0)
    monkeypatch.setattr(letters, "MOST_BLOCKS", 2)
    part = letters.count_training(plan, 0)
    expected = sum(letters._count_block(plan, 0, place) for place in range(2))
    assert part.tolist() == expected.tolist()
    assert part.sum() < whole.sum()
    assert np.abs(part / part.sum() - whole / whole.sum()).max() < 0.02
