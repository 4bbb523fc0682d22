"""Buckets, disks that are full, and file systems that stumble."""

import errno
import gzip
import hashlib
import json
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import storages
from bulk_works import ManyUnits, check_sum
from draws import random_sequence
from pyarrow.fs import FileSelector, PyFileSystem
from stumbles import DEEDS, Stumbling

import raptide.patience
from raptide.bulk import BulkSettings, OutputFolder, find_sources, folder, run_bulk, worker
from raptide.bulk.dedup import PARTITIONS, Copies, fill, match, write_marks, write_open
from raptide.bulk.exports import write_csv
from raptide.bulk.process import Limits
from raptide.bulk.sources.fasta import FastaFile
from raptide.bulk.sources.find import LENIENT
from raptide.bulk.worker import UnitWorker, read_units
from raptide.errors import ConfigError, RaptideError
from raptide.patience import TRIES, read_surely
from raptide.storage import Storage


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(raptide.patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=id, monotonic=time.monotonic))
    monkeypatch.setattr(folder, "SETTLE_S", 0.2)


def fasta(sequences):
    return "".join(f">p{n}\n{each}\n" for n, each in enumerate(sequences)).encode()


def work_without_ray(work, source, output):
    """What run_bulk does, but for Ray Data."""
    engine = UnitWorker(work, output, "stamp", Limits(1, 10**9, 60.0))
    with output.alone():
        output.refuse_strangers(work.fingerprint())
        output.write_manifest({"fingerprint": work.fingerprint()})
        units = read_surely(source.name, lambda: source.survey(0, work)).units
        for part in source.stretches(units):
            for unit in read_units([source], part):
                list(engine(unit))
        assert output.gather_rejects() == 1
        output.finish({"fingerprint": work.fingerprint()})
    engine._engine.close()
    rows = []
    for unit in output.parts():
        with output.open_part(unit) as part:
            rows += part.read(["id", "value"]).to_pylist()
    return rows


@pytest.mark.parametrize(
    ("compress", "times", "only"),
    [(bytes, 1, ()), (gzip.compress, 1, ()), (gzip.compress, 2, ("read", "open", "info", "list"))]
    + [(bytes, 3, (deed,)) for deed in ("create_dir", "create", "write", "move", "delete_dir")],
)
def test_a_file_system_that_stumbles_is_asked_again(tmp_path, compress, times, only):
    sequences = [random_sequence(20) for _ in range(30)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.fasta").write_bytes(compress(fasta([*sequences, "M1"])))
    stumbling = Stumbling(times, only=only)
    filesystem = PyFileSystem(stumbling)
    source = FastaFile(Storage(filesystem, str(tmp_path / "in")), "a.fasta", LENIENT)
    output = OutputFolder(Storage(filesystem, str(tmp_path / "out")))
    rows = work_without_ray(ManyUnits(str(tmp_path / "log")), source, output)
    assert rows == [{"id": f"p{n}", "value": check_sum(s)} for n, s in enumerate(sequences)]
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["manifest.json", "parts", "rejects.parquet"]
    assert {deed for deed, _ in stumbling.seen} >= set(only or DEEDS)


def a_unit(output, number, digests, values, *, copies=()):
    """A unit's part; open, without the numbers of `copies`, if it has some."""
    name = f"0000000-{'a' * 16}-{number:012d}"
    columns = {
        "id": pa.array([f"p{n}" for n in range(len(digests))], pa.large_string()),
        "sequence_sha256": digests,
        "length": pa.array([5] * len(digests), pa.int64()),
        "value": [None if d in copies else v for d, v in zip(digests, values, strict=True)],
    }
    if copies:
        stand = {"raptide_file": ["f"] * len(digests), "raptide_line": range(len(digests))}
        write_open(output, name, pa.table(columns | stand))
    else:
        output.write_part(name, pa.table(columns), "stamp")
    return name


@pytest.mark.parametrize("only", [("read",), ("open",), ()])
def test_copies_are_found_and_filled_in_on_one_that_stumbles(tmp_path, only):
    digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(40)]
    numbers = {digest: float(n) for n, digest in enumerate(digests)}
    output = OutputFolder(Storage(PyFileSystem(Stumbling(1, only=only)), str(tmp_path)))
    second = digests[20:] + digests[:20:2]
    names = (
        a_unit(output, 0, digests[:20], [numbers[d] for d in digests[:20]]),
        a_unit(output, 20, second, [numbers[d] for d in second], copies=set(digests[:20])),
    )
    for number, some in enumerate((digests[:20], second)):
        write_marks(output, names[number], [(number, some)])
    for partition in range(PARTITIONS):
        match(output, partition)
    copies = Copies(output, names)
    assert sorted(copies.of(names[1])) == sorted(d[:32] for d in digests[:20:2])
    fill(copies, names[1], "stamp")
    assert output.read_part(names[1])["value"].to_pylist() == [numbers[d] for d in second]
    assert not output.rejects(names[1]).num_rows
    write_csv(output)
    assert output.storage.read("scores.csv").count(b"\n") == 1 + 20 + 30


@pytest.mark.parametrize("deed", ["create", "write", "move", "read", "list"])
def test_one_that_never_works_is_named_in_one_sentence(tmp_path, deed):
    (tmp_path / "a.fasta").write_bytes(fasta(["MKLV"] * 20))
    filesystem = PyFileSystem(Stumbling(10**9, only=(deed,)))
    source = FastaFile(Storage(filesystem, str(tmp_path)), "a.fasta", LENIENT)
    output = OutputFolder(Storage(filesystem, str(tmp_path / "out")))
    with pytest.raises(RaptideError, match=r"cannot be \w+ \(Input/output error\)") as caught:
        work_without_ray(ManyUnits(str(tmp_path / "log")), source, output)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("partial/*"))


@pytest.mark.parametrize("deed", ["create", "write", "move"])
def test_a_full_disk_is_said_once_and_leaves_nothing_half_written(tmp_path, deed):
    stumbling = Stumbling(10**9, errno.ENOSPC, only=(deed,))
    storage = Storage(PyFileSystem(stumbling), str(tmp_path / "out"))
    with pytest.raises(RaptideError, match=r"parts/u cannot be written \(No space left on device"):
        storage.write("parts/u", lambda file: file.write(b"whole"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert max(stumbling.seen.values()) == 1, "tried again"


def test_what_is_written_in_several_tries_is_whole(tmp_path):
    storage = Storage(PyFileSystem(Stumbling(TRIES - 1, only=("write",))), str(tmp_path))
    storage.write("a", lambda file: file.write(b"whole"))
    assert storage.read("a") == b"whole"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]


@pytest.fixture(scope="module")
def uri():
    with storages.bucket("bulk") as uri:
        yield uri


def run(work, inputs, output, **settings):
    settings = BulkSettings(workers=2, memory_gb=1.0, **settings)
    return run_bulk(work, find_sources(inputs), output, settings)


def test_a_job_from_a_bucket_to_a_bucket_and_the_second_is_refused(cluster, uri, tmp_path):
    work = ManyUnits(str(tmp_path / "log"))
    sequences = [[random_sequence(12) for _ in range(20)] for _ in "ab"]
    inputs = Storage.at(uri.format("in"))
    for name, some in zip("ab", sequences, strict=True):
        inputs.write(f"deep/{name}.fasta", lambda file, some=some: file.write(fasta(some)))
        (tmp_path / f"{name}.fasta").write_bytes(fasta(some))
    inputs.write("deep/readme.md", lambda file: file.write(b"no protein"))
    here = OutputFolder.at(tmp_path / "out")
    run(work, [tmp_path / "a.fasta", tmp_path / "b.fasta"], here)
    there = OutputFolder.at(uri.format("out"))
    for given in ("in/deep/*.fasta", "in", "in/**/*.fasta", "in/deep/a.fasta"):
        found = find_sources([uri.format(given)])
        assert [source.name for source in found] == [
            f"bulk/in/deep/{name}.fasta" for name in ("a" if given.endswith("a.fasta") else "ab")
        ]
    with pytest.raises(ConfigError, match=r"\*\.faa.* is not there"):
        find_sources([uri.format("in/*.faa")])
    outcome = run(work, [uri.format("in/deep/*.fasta")], there)
    assert (outcome.rows, outcome.parts) == (40, 6)
    assert there.parts() == here.parts()
    for unit in here.parts():
        name = f"parts/{unit}.parquet"
        assert there.storage.read(name) == (tmp_path / "out" / name).read_bytes()
    assert names(there) == ["manifest.json", "parts", "rejects.parquet"]

    before = len(work.computed())
    with there.alone(), pytest.raises(ConfigError, match=r"Another job \(.*, process \d+"):
        run(work, [uri.format("in")], there)
    lease = json.dumps({"who": "a dead one", "alive": time.time() - folder.STALE_S - 1})
    there.storage.write(".lock", lambda file: file.write(lease.encode()))
    assert run(work, [uri.format("in")], there).rows == 40
    assert len(work.computed()) == before
    assert names(there) == ["manifest.json", "parts", "rejects.parquet"]
    there.storage.write("mine.txt", lambda file: file.write(b"keep"))
    few = ManyUnits(work.log, seed=1)
    assert run(few, [uri.format("in/deep/a.fasta")], there, replace=True).rows == 20
    assert "mine.txt" in names(there)
    strangers = OutputFolder.at(uri.format("in"))
    with pytest.raises(ConfigError, match="holds files that no job"):
        run(few, [tmp_path / "a.fasta"], strangers, replace=True)


def names(output):
    infos = output.storage.filesystem.get_file_info(FileSelector(output.storage.path))
    return sorted(info.base_name for info in infos)


def test_of_two_that_begin_at_once_in_a_bucket_one_goes_on(uri, monkeypatch):
    """Both have found no lease before either has written one."""
    output, other = OutputFolder.at(uri.format("race")), OutputFolder.at(uri.format("race"))
    sleep, entered = time.sleep, []

    def second_begins(seconds):
        monkeypatch.setattr(folder.time, "sleep", sleep)
        lease = json.dumps({"who": "the other", "alive": time.time()})
        other.storage.write(".lock", lambda file: file.write(lease.encode()))

    monkeypatch.setattr(folder.time, "sleep", second_begins)
    with pytest.raises(ConfigError, match=r"Another job \(the other\)"), output.alone():
        entered.append(1)
    assert not entered
    assert other.storage.holds(".lock"), "the winner's lease is not the loser's to delete"


def test_a_lease_is_renewed_through_hiccups_and_given_back(uri, monkeypatch):
    monkeypatch.setattr(folder, "HEARTBEAT_S", 0.05)
    output = OutputFolder.at(uri.format("beats"))
    with output.alone():
        first = json.loads(output.storage.read(".lock"))["alive"]
        write = Storage.write
        monkeypatch.setattr(Storage, "write", lambda *_: exec("raise RaptideError('a hiccup')"))
        time.sleep(0.3)
        monkeypatch.setattr(Storage, "write", write)
        deadline = time.monotonic() + 20
        while json.loads(output.storage.read(".lock"))["alive"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not output.storage.holds(".lock")


def test_a_job_on_a_full_disk_ends_in_one_sentence_and_goes_on_when_there_is_room(
    cluster, tmp_path
):
    work = ManyUnits(str(tmp_path / "log"))
    (tmp_path / "a.fasta").write_bytes(fasta([random_sequence(20) for _ in range(60)]))
    with storages.small_disk(tmp_path / "disk", 1) as disk:
        (disk / "filler").write_bytes(b"x" * ((1 << 20) - 24 * 1024))
        output = OutputFolder.at(disk / "out")
        with pytest.raises(RaptideError, match="No space left on device") as caught:
            run(work, [tmp_path / "a.fasta"], output)
        assert "\n" not in str(caught.value)
        assert not list((disk / "out").rglob("partial/*"))
        (disk / "filler").unlink()
        assert run(work, [tmp_path / "a.fasta"], output).rows == 60
        assert pq.read_table(disk / "out/parts")["id"].to_pylist() == [f"p{n}" for n in range(60)]
