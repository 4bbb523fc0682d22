"""A corpus at a URI: the same blocks, read from afar once."""

import os
import threading

import numpy as np
import pyarrow.fs
import pytest
import storages
import yaml
from lone_worker import run_here
from small_runs import as_recipe, losses, make_recipe
from stumbles import hurry

from raptide.data import corpus_files, nearby
from raptide.data.corpus import Corpus
from raptide.errors import ConfigError, CorpusError, RaptideError, StorageStumbled
from raptide.evaluation.benchmark import Benchmark
from raptide.evaluation.subjects.ngrams import uniform
from raptide.evaluation.tasks.perplexity import PerplexitySettings, PerplexityTask
from raptide.patience import TRIES
from raptide.storage import Storage
from raptide.training.planning.resuming import with_absolute_paths


@pytest.fixture(scope="module")
def bucket():
    with storages.bucket("corpora") as uri:
        yield uri


@pytest.fixture
def far(bucket, corpus, request, monkeypatch, tmp_path):
    """A copy of the session's corpus in a bucket, and a cache with nothing in it."""
    monkeypatch.setenv("RAPTIDE_CACHE", str(tmp_path / "cache"))
    uri = bucket.format(f"{request.node.name.split('[')[0]}/x")
    storage = Storage.at(uri)
    pyarrow.fs.copy_files(str(corpus.path), storage.path, destination_filesystem=storage.filesystem)
    return Corpus.open(uri)


def in_bucket(far, name):
    storage = Storage.at(far.where)
    return storage.filesystem, storage.full(name)


def test_its_blocks_are_those_of_the_folder(far, corpus):
    assert far.digest == corpus.digest
    far.verify()
    for split in ("train", "heldout"):
        assert far.blocks(split) == corpus.blocks(split)
        for block in corpus.blocks(split):
            for _ in range(2):  # from afar, then from nearby
                found, expected = far.read_block(block), corpus.read_block(block)
                assert found.clusters.equals(expected.clusters)
                np.testing.assert_array_equal(found.residues, expected.residues)
                np.testing.assert_array_equal(found.member_splits, expected.member_splits)


def test_a_block_is_read_from_afar_once(far, tmp_path):
    block = far.blocks("train")[0]
    expected = far.read_block(block)
    filesystem, path = in_bucket(far, block["shard"])
    filesystem.delete_file(path)
    found = Corpus.open(far.where).read_block(block)
    np.testing.assert_array_equal(found.residues, expected.residues)
    (kept,) = (tmp_path / "cache/blocks").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # as after a crash
    with pytest.raises(CorpusError, match=rf"{block['shard']}.* is missing"):
        far.read_block(block)


def test_nothing_is_kept_where_nothing_may_be(far, tmp_path, monkeypatch):
    monkeypatch.setenv(nearby.BUDGET, "0")
    far.read_block(far.blocks("train")[0])
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv(nearby.BUDGET, "much")
    with pytest.raises(ConfigError, match="RAPTIDE_BLOCKS_GB must be a number of gigabytes"):
        far.read_block(far.blocks("train")[0])


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for age in range(10):
        file = tmp_path / f"{age}.arrow"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 - age, 1000 - age))
    nearby.trim(tmp_path, 1000)
    assert len(list(tmp_path.iterdir())) == 10
    nearby.trim(tmp_path, 600)
    left = {file.stem for file in tmp_path.iterdir()}
    assert left == {"0", "1", "2", "3", "4"}


def test_many_read_and_trim_at_once(far, monkeypatch):
    """Threads with room for two blocks; every answer is right."""
    blocks = list(far.blocks("train"))
    expected = [far.read_block(block).residues.sum() for block in blocks]
    monkeypatch.setattr(nearby, "TRIM_EVERY", 1)
    monkeypatch.setenv(nearby.BUDGET, "0.00005")
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(len(blocks), size=20):
            if far.read_block(blocks[index]).residues.sum() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_damage_is_told_from_trouble(far):
    block = far.blocks("train")[0]
    filesystem, path = in_bucket(far, block["shard"])
    content = bytearray(filesystem.open_input_file(path).read())
    content[len(content) // 3] ^= 1
    with filesystem.open_output_stream(path) as file:
        file.write(bytes(content))
    with pytest.raises(CorpusError, match=r"s3://.*is damaged: expected sha256"):
        far.verify()
    filesystem.delete_file(in_bucket(far, "manifest.json")[1])
    with pytest.raises(CorpusError, match="holds no finished corpus"):
        Corpus.open(far.where)
    with pytest.raises(ConfigError, match="corpus cannot be"):
        Corpus.open("nowhere://x")


class Failing:
    """A bucket's file whose first reads fail with what pyarrow says of S3, without a number."""

    def __init__(self, file, words, times):
        self._file, self._words, self._left = file, words, times

    def __getattr__(self, name):
        return getattr(self._file, name)

    def read(self, size=None):
        if self._left[0]:
            self._left[0] -= 1
            raise OSError(self._words)
        return self._file.read(size)


NETWORK = "When reading object: AWS Error NETWORK_CONNECTION during GetObject operation"
DENIED = "When reading object: AWS Error ACCESS_DENIED during GetObject operation: no"


@pytest.mark.parametrize(
    ("words", "times", "raised", "tries"),
    [
        (NETWORK, TRIES - 1, None, TRIES),
        (NETWORK, 10**6, StorageStumbled, TRIES),
        (DENIED, 10**6, RaptideError, 1),
    ],
)
def test_a_bucket_that_stumbles_is_asked_again_and_one_that_refuses_is_not(
    far, monkeypatch, words, times, raised, tries
):
    block = far.blocks("train")[0]
    pauses, left, opened = hurry(monkeypatch), [times], corpus_files.FarFile
    monkeypatch.setattr(corpus_files, "FarFile", lambda file: opened(Failing(file, words, left)))
    if raised is None:
        far.read_block(block)
    else:
        with pytest.raises(raised) as told:
            far.read_block(block)
        assert type(told.value) is raised
        assert words in str(told.value)
    assert len(pauses) == tries - 1


def test_models_are_asked_its_held_out_proteins(far, corpus, tmp_path):
    tasks = [
        PerplexityTask(PerplexitySettings(name="x", corpus=where), tmp_path / "cache")
        for where in (far.where, corpus.path)
    ]
    one, other = (list(task.requests(uniform())) for task in tasks)
    assert one == other
    assert len(one) > 20
    ((manifest,), (local,)) = (task.files() for task in tasks)
    assert manifest.read_bytes() == local.read_bytes()
    assert manifest.stem == local.stem
    tree = {"name": "b", "tasks": [{"kind": "perplexity", "corpus": far.where}]}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(tree))
    (settings,) = Benchmark.load(tmp_path / "bench.yaml").tasks
    assert settings.corpus == far.where


def test_a_run_trains_on_it_as_on_the_folder(far, corpus, alone, tmp_path):
    curves = []
    for place in (str(corpus.path), far.where):
        tree = make_recipe(corpus, steps=6) | {"corpus": place}
        recipe = with_absolute_paths(as_recipe(tree, workers=1))
        run = tmp_path / f"run-{len(curves)}"
        run_here(recipe, run, ray_data=True)
        curves.append(losses(run))
    assert curves[0] == curves[1]
    assert recipe.corpus[0].path == far.where
