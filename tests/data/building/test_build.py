"""A build at scale, made small: many parts, many buckets, interruptions, giant clusters."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray.data
from scipy.stats import chisquare

from raptide import patience
from raptide.data.building import build as build_module
from raptide.data.building import shuffle as shuffle_module
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.cleaning import CleaningSettings
from raptide.data.corpus import Corpus
from raptide.data.fasta_text import split_fasta
from raptide.data.streaming.rows import draw_members
from raptide.errors import (
    CorpusError,
    FastaError,
    PassingTrouble,
    RaptideError,
    StorageStumbled,
)

LETTERS = "LAGVSERTIDPKQNFYMHWC"
SETTINGS = BuildSettings(
    block_residues=4096,
    holdout_fraction=0.2,
    cluster_tag="cluster50",
    cleaning=CleaningSettings(min_residues=25, drop_duplicates=True),
)
BUCKET_RESIDUES = 16_384


def protein(rng, longest=200):
    return "".join(rng.choices(LETTERS, k=rng.randint(20, longest)))


@pytest.fixture(scope="module")
def text():
    """1,500 proteins in 500 clusters, with copies among them and one large cluster."""
    rng = random.Random(11)
    letters = [protein(rng) for _ in range(1400)]
    letters += rng.sample(letters, 100)
    clusters = [0] * 300 + [rng.randrange(1, 500) for _ in range(1200)]
    return [
        f">p{number} cluster50=c{cluster}\n{sequence}\n"
        for number, (sequence, cluster) in enumerate(zip(letters, clusters, strict=True))
    ]


@pytest.fixture
def small_scale(monkeypatch):
    """Parts and buckets so small that a little input has many of both, and is shuffled twice."""
    monkeypatch.setattr(build_module, "BUCKET_RESIDUES", BUCKET_RESIDUES)
    monkeypatch.setattr(build_module, "split_fasta", partial(split_fasta, part_bytes=5000))
    monkeypatch.setattr(shuffle_module, "MAX_PIECES", 3)
    monkeypatch.setattr(shuffle_module, "INPUT_BATCH_BYTES", 20_000)


def rows(corpus):
    return [
        row
        for shard in corpus.manifest["shards"]
        for row in pq.read_table(corpus.path / shard["name"]).to_pylist()
    ]


@pytest.fixture(scope="module")
def expected(cluster, text, tmp_path_factory):
    """The corpus in one piece: one file in one part, but the same buckets."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "a.fasta").write_text("".join(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "BUCKET_RESIDUES", BUCKET_RESIDUES)
        return build_corpus([folder / "a.fasta"], folder / "corpus", SETTINGS)


@pytest.mark.usefixtures("small_scale")
def test_parts_order_and_files_change_nothing(expected, text, tmp_path):
    assert len(expected.manifest["shards"]) > 10, "the build should have many buckets"
    assert set(expected.manifest["dropped"]) >= {"too_short", "duplicate"}
    shuffled = random.Random(3).sample(text, len(text))
    inputs = []
    for number in range(3):
        inputs.append(tmp_path / f"{2 - number}.fasta")
        inputs[-1].write_text("".join(shuffled[number::3]))
    assert sum(len(build_module.split_fasta(path)) for path in inputs) > 20
    corpus = build_corpus(inputs, tmp_path / "corpus", SETTINGS)
    assert corpus.digest == expected.digest
    for field in ("counts", "dropped", "read", "residue_counts", "length_histogram"):
        assert corpus.manifest[field] == expected.manifest[field]
    assert not list(tmp_path.glob("corpus.partial*"))


SCRIPT = """
import sys
from functools import partial
from raptide.cluster import ray_session
from raptide.data.building import build
from raptide.data.fasta_text import split_fasta
build.BUCKET_RESIDUES = int(sys.argv[3])
build.split_fasta = partial(split_fasta, part_bytes=5000)
with ray_session(num_cpus=1):
    settings = build.BuildSettings.model_validate_json(sys.argv[4])
    build.build_corpus([sys.argv[1]], sys.argv[2], settings)
"""


def start(folder):
    arguments = [folder / "a.fasta", folder / "corpus", BUCKET_RESIDUES, SETTINGS.model_dump_json()]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)])


@pytest.mark.usefixtures("small_scale")
def test_a_killed_build_goes_on_and_keeps_what_was_finished(expected, text, tmp_path):
    (tmp_path / "a.fasta").write_text("".join(text))
    partial_folder = tmp_path / "corpus.partial"
    killed = start(tmp_path)
    while not list(partial_folder.glob("bucket-*.json")):
        assert killed.poll() is None, "the build ended before it could be killed"
        time.sleep(0.001)
    family = [killed, *psutil.Process(killed.pid).children(recursive=True)]
    for process in family:
        if process.is_running() if isinstance(process, psutil.Process) else True:
            os.kill(process.pid, signal.SIGKILL)
    killed.wait()
    psutil.wait_procs([p for p in family if isinstance(p, psutil.Process)], timeout=20)
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(CorpusError, match="no finished corpus"):
        Corpus.open(partial_folder)
    shards = {file.name: file.stat().st_ino for file in partial_folder.glob("*.parquet")}
    finished = len(list(partial_folder.glob("bucket-*.json")))
    lines = []
    again = build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", SETTINGS, say=lines.append)
    output = "\n".join(lines)
    assert "Going on with the interrupted build" in output
    assert "Pass 1" not in output, "the survey was done"
    assert "Pass 2" in output
    corpus = Corpus.open(tmp_path / "corpus")
    corpus.verify()
    assert corpus.digest == again.digest == expected.digest
    assert corpus.manifest["counts"] == expected.manifest["counts"]
    kept = [name for name, inode in shards.items() if (corpus.path / name).stat().st_ino == inode]
    assert len(kept) >= finished > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.fasta", "corpus"]


@pytest.mark.usefixtures("small_scale")
def test_a_partial_build_of_other_files_or_settings_is_not_gone_on_with(text, tmp_path):
    (tmp_path / "a.fasta").write_text("".join(text[:200]))
    lines = []

    def interrupt(line):
        lines.append(line)
        if "Pass 2" in line:
            raise KeyboardInterrupt

    def build(say=lines.append, **settings):
        settings = SETTINGS.model_copy(update=settings)
        return build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", settings, say=say)

    with pytest.raises(KeyboardInterrupt):
        build(interrupt)
    assert (tmp_path / "corpus.partial").is_dir()
    build(holdout_fraction=0.5)
    assert not any("Going on" in line for line in lines)


@pytest.mark.usefixtures("small_scale")
def test_a_full_disk_is_said_in_one_sentence_and_a_stumble_is_not(
    expected, text, tmp_path, monkeypatch
):
    """Ray wraps what a task raises, without its number."""
    (tmp_path / "a.fasta").write_text("".join(text))
    write_bucket = build_module.write_bucket

    def refuse(bucket, *args, **kwargs):
        if bucket >= 3:
            raise OSError(errno.ENOSPC, "Error writing bytes to file")
        return write_bucket(bucket, *args, **kwargs)

    def stumble(bucket, *args, **kwargs):
        stumbled = tmp_path / f"{bucket}.stumbled"
        if not stumbled.exists():
            stumbled.touch()
            raise OSError(errno.EIO, "the network drive is away")
        return write_bucket(bucket, *args, **kwargs)

    def build(say):
        return build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", SETTINGS, say=say)

    monkeypatch.setattr(build_module, "write_bucket", refuse)
    with pytest.raises(RaptideError, match=r"broke off \(No space left on device\)") as caught:
        build(print)
    assert str(tmp_path / "corpus.partial") in str(caught.value)
    assert not isinstance(caught.value, PassingTrouble)
    monkeypatch.setattr(build_module, "write_bucket", stumble)
    lines = []
    assert build(lines.append).digest == expected.digest
    assert any("Going on" in line for line in lines)
    assert not any("Pass 1" in line for line in lines)


def test_an_input_is_hashed_patiently_and_named_where_it_cannot_be_read(tmp_path, monkeypatch):
    file = tmp_path / "a.fasta"
    file.write_text(">a\nMKV\n")
    facts = build_module._describe._function(str(file))
    errors = [OSError(errno.EIO, "away"), OSError(errno.ETIMEDOUT, "slow")]

    def stumble(path):
        if errors:
            raise errors.pop()
        return facts["sha256"]

    monkeypatch.setattr(build_module, "sha256_of_file", stumble)
    assert build_module._describe._function(str(file)) == facts
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0)
    errors += [OSError(errno.ESTALE, "gone")] * 9
    with pytest.raises(StorageStumbled, match=r"a\.fasta cannot be read \(Stale file handle\)"):
        build_module._describe._function(str(file))


@pytest.mark.usefixtures("small_scale")
def test_killed_workers_change_nothing(expected, text, tmp_path):
    (tmp_path / "a.fasta").write_text("".join(text))
    stop = threading.Event()
    killed = []

    def kill_workers():
        while not stop.wait(0.5) and len(killed) < 4:
            for process in psutil.process_iter(["name", "cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if title.startswith(("ray::MapBatches", "ray::Sort")) and len(killed) < 4:
                    process.kill()
                    killed.append(title)
                    break

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        corpus = build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", SETTINGS)
    finally:
        stop.set()
        killer.join()
    assert killed, "no worker was caught at work"
    assert corpus.digest == expected.digest
    corpus.verify()


@pytest.mark.usefixtures("cluster", "small_scale")
def test_a_mistake_in_a_later_part_is_named_with_its_line_and_leaves_nothing(text, tmp_path):
    bad = [*text[:900], ">bad\nMKLV\nMK-V\n", *text[900:]]
    (tmp_path / "a.fasta").write_text("".join(bad))
    with pytest.raises(FastaError, match=r"a.fasta:1801: record 'bad': .*position 7 holds '-'"):
        build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.fasta"]


def test_a_cluster_larger_than_blocks_and_buckets_is_cut_and_drawn_from_evenly(
    cluster, tmp_path, monkeypatch
):
    """Ray cuts the bucket into pieces too, since its own blocks are made small here."""
    monkeypatch.setattr(build_module, "BUCKET_RESIDUES", BUCKET_RESIDUES)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 20_000)
    rng = random.Random(5)
    members = [f">m{i} cluster50=giant\n{protein(rng, 120)}\n" for i in range(2000)]
    others = [f">o{i}\n{protein(rng)}\n" for i in range(200)]
    (tmp_path / "a.fasta").write_text("".join(rng.sample([*members, *others], 2200)))
    settings = BuildSettings(block_residues=4096, cluster_tag="cluster50", holdout_fraction=0.0)
    corpus = build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", settings)
    giant = [row for row in rows(corpus) if row["cluster"] == "giant"]
    assert len(giant) > 20
    assert all(sum(row["lengths"]) <= 4096 for row in giant)
    assert all(row["cluster_size"] == 2000 for row in giant)
    assert [row["first_member"] for row in giant] == np.cumsum(
        [0, *(len(row["ids"]) for row in giant)]
    )[:-1].tolist()
    assert sorted(name for row in giant for name in row["ids"]) == sorted(
        f"m{i}" for i in range(2000)
    )
    assert_drawn_evenly(corpus, "giant", 2000)


def assert_drawn_evenly(corpus, name, size, epochs=3000, cells=20):
    """Each epoch draws one member of the cluster; the draws pass a chi-square test."""
    drawn = np.zeros(size)
    blocks = [corpus.read_block(block) for block in corpus.blocks("train")]
    with_giant = [b for b in blocks if name in b.clusters.to_pylist()]
    for epoch in range(epochs):
        found = []
        for block in with_giant:
            members = draw_members(block, "members", 1, epoch)
            row = np.searchsorted(block.member_splits, members, side="right") - 1
            for member, index in zip(members.tolist(), row.tolist(), strict=True):
                if block.clusters[index].as_py() == name:
                    found.append(block.first_member[index] + member - block.member_splits[index])
        assert len(found) == 1, "one row alone holds the drawn member"
        drawn[found[0]] += 1
    assert chisquare(drawn.reshape(cells, -1).sum(axis=1)).pvalue > 0.001


UNIREF = """>UniRef100_B1 One n=1 Tax=Homo sapiens TaxID=9606 RepID=A_HUMAN
MKLVWWFFYYMKLVWWFFYY
>UniRef100_A1 Two n=3 Tax=Escherichia coli (strain K12) TaxID=83333 RepID=A_ECOLI
MKLVWWFFYR
>UniRef100_C1 Three n=12 Tax=Homo sapiens TaxID=9606 RepID=C_HUMAN
MKLVWWFFYD
"""


def test_uniref_headers_are_understood(cluster, tmp_path):
    (tmp_path / "a.fasta").write_text(UNIREF)
    names = ["B1", "A1", "C1"]
    table = "".join(f"UniRef50_A1\tUniRef100_{name}\n" for name in names)
    (tmp_path / "t.tsv").write_text(table)
    settings = BuildSettings(holdout_fraction=0.0)
    by_table = build_corpus(
        [tmp_path / "a.fasta"], tmp_path / "c", settings, cluster_tables=[tmp_path / "t.tsv"]
    )
    (row,) = rows(by_table)
    assert row["cluster"] == "UniRef50_A1"
    assert row["ids"] == ["UniRef100_A1", "UniRef100_B1", "UniRef100_C1"], "A1 represents"
    assert by_table.manifest["stated_members"] == 1 + 3 + 12
    species = settings.model_copy(update={"cluster_tag": "Tax"})
    by_species = build_corpus([tmp_path / "a.fasta"], tmp_path / "d", species)
    assert {row["cluster"]: len(row["ids"]) for row in rows(by_species)} == {
        "Homo sapiens": 2,
        "Escherichia coli (strain K12)": 1,
    }


def test_uniprot_names_meet_the_accessions_that_mmseqs2_writes(cluster, tmp_path):
    (tmp_path / "a.fasta").write_text(
        ">sp|P1|A_HUMAN x\nMKLVWWFFYY\n>tr|Q2|B_HUMAN\nMKLVWWFFYYLLLL\n"
    )
    (tmp_path / "t.tsv").write_text("P1\tP1\nP1\tQ2\n")
    corpus = build_corpus(
        [tmp_path / "a.fasta"],
        tmp_path / "c",
        BuildSettings(holdout_fraction=0.0),
        cluster_tables=[tmp_path / "t.tsv"],
    )
    (row,) = rows(corpus)
    assert (row["cluster"], row["ids"]) == ("P1", ["sp|P1|A_HUMAN", "tr|Q2|B_HUMAN"])
