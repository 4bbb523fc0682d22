"""Bulk job, engine and endpoint: one number each, whoever is asked."""

import numpy as np
import pytest
import torch
from draws import generator, random_sequence, random_weights
from ray import serve as ray_serve

from raptide import Client, Engine
from raptide.alphabet import STANDARD
from raptide.bulk import EmbedWork, OutputFolder, ScanWork, ScoreWork, child, find_sources
from raptide.bulk.process import Limits
from raptide.bulk.variants import VariantWork, write_item
from raptide.bulk.work import Model
from raptide.bulk.worker import UnitWorker, read_units
from raptide.model.formats.detect import write_weights
from serve.app import build


class Here:
    """An engine in this process, which computes as one in its own does."""

    opening_s = 0.0

    def __init__(self, work):
        self.work = work
        before = torch.get_num_threads()
        self.open = work.open(before)

    def compute(self, items):
        found = [None] * len(items)
        for places in child.slices(self.work, items):
            values = self.open([items[place] for place in places])
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

    def close(self):
        pass


def rows_of_a_job(work, sequences, folder):
    """The rows of all parts of a job, without Ray."""
    folder.mkdir(exist_ok=True)
    text = "".join(f">{n}\n{sequence}\n" for n, sequence in enumerate(sequences))
    (folder / "in.fasta").write_text(text)
    sources = find_sources([folder / "in.fasta"])
    output = OutputFolder.at(folder / str(len(list(folder.iterdir()))))
    worker = UnitWorker(work, output, "stamp", Limits(1, 10**9, 60.0))
    worker._engine = Here(work)
    for part in sources[0].stretches(sources[0].survey(0, work).units):
        for unit in read_units(sources, part):
            list(worker(unit))
    rows = []
    for unit in output.parts():
        with output.open_part(unit) as part:
            rows += part.read().to_pylist()
    assert [row["id"] for row in rows] == [str(n) for n in range(len(sequences))]
    return rows


def assert_equal(rows, column, expected):
    for row, theirs in zip(rows, expected, strict=True):
        np.testing.assert_allclose(np.array(row[column], np.float64), theirs, atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def sequences():
    return ["MKTAYIAKQR", "M", *[random_sequence(int(generator().integers(2, 60))) for _ in "ab"]]


@pytest.fixture(scope="module")
def endpoint(proxy, bundle):
    """One that computes in fp32 on any processor."""
    model = {"name": "exact", "path": str(bundle), "dtype": "fp32", "cpus_per_replica": 0.5}
    arguments = {"models": [model], "keys_file": str(proxy.keys_file)}
    ray_serve.run(build(arguments), name="exact", route_prefix="/exact")
    yield f"{proxy.url}/exact"
    ray_serve.delete("exact", _blocking=False)


@pytest.fixture
def remote(endpoint, proxy, monkeypatch):
    monkeypatch.setenv("RAPTIDE_API_KEY", proxy.key)
    with Client(endpoint) as remote:
        yield remote


@pytest.fixture(scope="module")
def plain(bundle):
    return Engine.load(bundle, dtype="fp32")


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
def test_embeddings(pooling, bundle, plain, remote, sequences, tmp_path):
    model = Model.find(bundle)
    for layers in ((-1,), (0, -1), (2, 1, 0)):
        work = EmbedWork(model, "fp32", "reject", pooling, layers)
        rows = rows_of_a_job(work, sequences, tmp_path)
        for answer in (
            plain.embed(sequences, layers, pooling),
            remote.embed(sequences, pooling, layers),
        ):
            for index, column in enumerate(work.names):
                theirs = [each[index] for each in answer] if len(layers) > 1 else answer
                assert_equal(rows, column, theirs)


@pytest.mark.parametrize("method", ["pseudo-ppl", "one-pass"])
def test_scores(method, bundle, plain, remote, sequences, tmp_path):
    work = ScoreWork(Model.find(bundle), "fp32", "reject", method)
    rows = rows_of_a_job(work, sequences, tmp_path)
    assert_equal(rows, "score", plain.score_sequences(sequences, method))
    assert_equal(rows, "score", remote.score_sequences(sequences, method))


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals"])
def test_scans(method, bundle, plain, remote, sequences, tmp_path):
    work = ScanWork(Model.find(bundle), "fp32", "reject", method)
    rows = rows_of_a_job(work, sequences, tmp_path)
    assert_equal(rows, "scan", [plain.scan(each, method) for each in sequences])
    assert_equal(rows, "scan", [remote.scan(each, method) for each in sequences])


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals", "pseudo-ppl"])
def test_variants(method, bundle, plain, remote, sequences):
    model = Model.find(bundle)
    work = VariantWork((model,), "fp32", "reject", (method,), ("score",))
    for protein in sequences:
        variants = some_variants(protein)
        items = [write_item(protein, variant) for variant in variants]
        rows = [{"score": value[0]} for value in Here(work).compute(items)]
        assert_equal(rows, "score", plain.score_variants(protein, variants, method))
        assert_equal(rows, "score", remote.score_variants(protein, variants, method))


def some_variants(protein):
    """Single ones, and where there is room one of three changes."""
    rng = generator()
    places = rng.permutation(len(protein))[:6]
    changes = [
        f"{protein[place]}{place + 1}{rng.choice(list(STANDARD.replace(protein[place], '')))}"
        for place in places
    ]
    return [*changes, ":".join(changes[:3])]


def test_windows_of_long_proteins(tmp_path):
    shape = {"family": "esm1b", "layers": 1, "width": 8, "heads": 2, "max_positions": 34}
    write_weights(tmp_path / "m", random_weights(**shape))
    model, engine = Model.find(tmp_path / "m"), Engine.load(tmp_path / "m", dtype="fp32")
    assert model.max_residues == engine.max_residues == 32
    long = [random_sequence(length) for length in (5, 32, 33, 150)]
    for pooling in ("mean", "bos", "residue"):
        rows = rows_of_a_job(EmbedWork(model, "fp32", "window", pooling), long, tmp_path / "jobs")
        assert_equal(rows, "embedding", engine.embed(long, pooling=pooling, long="window"))
    for method in ("pseudo-ppl", "one-pass"):
        rows = rows_of_a_job(ScoreWork(model, "fp32", "window", method), long, tmp_path / "jobs")
        assert_equal(rows, "score", engine.score_sequences(long, method, "window"))
    for method in ("wt-marginals", "masked-marginals"):
        rows = rows_of_a_job(ScanWork(model, "fp32", "window", method), long, tmp_path / "jobs")
        assert_equal(rows, "scan", [engine.scan(each, method, "window") for each in long])
