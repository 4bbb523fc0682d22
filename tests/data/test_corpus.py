import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stumbles import hurry, stumbling

from raptide.alphabet import decode_residues
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.corpus import CLUSTER_ROW, MANIFEST, Corpus
from raptide.errors import CorpusError, FastaError, InputError, PassingTrouble, RaptideError
from raptide.patience import TRIES

pytestmark = pytest.mark.usefixtures("cluster")

SETTINGS = BuildSettings(block_residues=4096, cluster_tag="cluster50", holdout_fraction=0.3)


def records(seed=1, clusters=60):
    """Random proteins in clusters of unequal size; some names occur twice."""
    rng = random.Random(seed)
    for cluster in range(clusters):
        for member in range(rng.choice([1, 1, 2, 5, 30])):
            letters = "".join(rng.choices("LAGVSERTIDPKQNFYMHWC", k=rng.randint(20, 300)))
            yield f">c{cluster}m{member} cluster50=c{cluster}m0 x=1\n{letters}\n"
    yield ">twin\nMKLVWWFFYY\n>twin\nMKLVWWFFYR\n"


@pytest.fixture(scope="module")
def text():
    return list(records())


@pytest.fixture(scope="module")
def built(cluster, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    (folder / "a.fasta").write_text("".join(text))
    return build_corpus([folder / "a.fasta"], folder / "corpus", SETTINGS)


def shard_rows(corpus, split):
    shards = [s["name"] for s in corpus.manifest["shards"] if s["split"] == split]
    return [row for name in shards for row in pq.read_table(corpus.path / name).to_pylist()]


def test_every_record_is_there_once_in_its_cluster(built, text):
    expected = {}
    for record in text:
        header, letters, _ = record.split("\n", 2)
        expected[letters] = header[1:].split()[0]
    expected["MKLVWWFFYR"], expected["MKLVWWFFYY"] = "twin", "twin"
    found, clusters = {}, {}
    for split in ("train", "heldout"):
        for row in shard_rows(built, split):
            clusters.setdefault(row["cluster"], set()).add(split)
            for name, member, length in zip(
                row["ids"], row["members"], row["lengths"], strict=True
            ):
                letters = decode_residues(np.frombuffer(member, np.uint8))
                assert len(letters) == length
                found[letters] = name.split("#")[0]
    assert found == expected
    assert all(len(splits) == 1 for splits in clusters.values()), "a cluster in both splits"
    assert built.manifest["renamed_duplicates"] == 1


def test_rows_are_as_the_design_says(built):
    rows = shard_rows(built, "train") + shard_rows(built, "heldout")
    shard = built.manifest["shards"][0]["name"]
    assert pq.read_schema(built.path / shard).equals(CLUSTER_ROW)
    by_cluster = {}
    for row in rows:
        by_cluster.setdefault(row["cluster"], []).append(row)
    assert any(len(parts) > 1 for parts in by_cluster.values()), "no cluster spans rows"
    for name, parts in by_cluster.items():
        firsts = np.cumsum([0, *(len(p["ids"]) for p in parts)])
        assert [p["first_member"] for p in parts] == firsts[:-1].tolist()
        assert {p["cluster_size"] for p in parts} == {firsts[-1]}
        assert parts[0]["ids"][0] == name, "the representative carries the cluster's name"


def test_a_process_that_only_reads_needs_no_other_module(built):
    """Parts of pyarrow are there only where somebody has imported them."""
    code = (
        f"from raptide.data.corpus import Corpus; Corpus.open({str(built.path)!r}).blocks('train')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_manifest_counts_are_those_of_the_rows(built):
    for split in ("train", "heldout"):
        rows = shard_rows(built, split)
        assert built.manifest["counts"][split] == {
            "clusters": sum(row["first_member"] == 0 for row in rows),
            "sequences": sum(len(row["ids"]) for row in rows),
            "residues": sum(sum(row["lengths"]) for row in rows),
        }
        assert sum(built.manifest["residue_counts"][split].values()) == sum(
            sum(row["lengths"]) for row in rows
        )
    blocks = built.blocks("train")
    assert all(block["residues"] >= 4096 for block in blocks[:-1])
    assert sum(b["residues"] for b in blocks) == built.manifest["counts"]["train"]["residues"]


def test_the_digest_knows_neither_order_nor_files_nor_compression(built, text, tmp_path):
    shuffled = random.Random(2).sample(text, len(text))
    (tmp_path / "b.fasta").write_text("".join(shuffled[:40]))
    (tmp_path / "a.fasta.gz").write_bytes(gzip.compress("".join(shuffled[40:]).encode()))
    inputs = [tmp_path / "b.fasta", tmp_path / "a.fasta.gz"]
    assert build_corpus(inputs, tmp_path / "corpus", SETTINGS).digest == built.digest
    other = build_corpus(inputs[:1], tmp_path / "other", SETTINGS)
    assert other.digest != built.digest


def test_records_of_one_name_are_clusters_of_their_own_without_a_tag(tmp_path):
    (tmp_path / "a.fasta").write_text(">x\nMKLVWWFFYY\n>x\nMKLVWWFFYR\n>y\nMKLVWWFFYD\n")
    settings = BuildSettings(holdout_fraction=0.0)
    corpus = build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", settings)
    rows = shard_rows(corpus, "train")
    assert sorted((row["cluster"], row["ids"]) for row in rows) == [
        ("x", ["x"]),
        ("x#2", ["x#2"]),
        ("y", ["y"]),
    ]


def test_damage_is_found_and_named(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built.path, copy)
    Corpus.open(copy).verify()
    shard = copy / built.manifest["shards"][0]["name"]
    metadata = pq.read_metadata(shard).row_group(0)
    chunk = next(
        metadata.column(i)
        for i in range(metadata.num_columns)
        if metadata.column(i).path_in_schema.startswith("members")
    )
    data = bytearray(shard.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorpusError, match=f"{shard.name} is damaged: expected sha256"):
        Corpus.open(copy).verify()
    with pytest.raises(CorpusError, match=f"{shard.name}, row group 0 cannot be read"):
        Corpus.open(copy).read_block(built.blocks("train")[0])
    manifest = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(manifest.replace(built.digest, "0" * 64))
    shutil.copy(built.path / shard.name, shard)
    with pytest.raises(CorpusError, match=f"manifest.json is damaged: it says digest {'0' * 64}"):
        Corpus.open(copy).verify()


def test_a_missing_shard_is_called_missing(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built.path, copy)
    shard = copy / built.manifest["shards"][0]["name"]
    shard.unlink()
    with pytest.raises(CorpusError, match=f"{shard.name} is missing") as caught:
        Corpus.open(copy).verify()
    assert "damaged" not in str(caught.value)
    with pytest.raises(CorpusError, match=f"{shard.name} is missing"):
        Corpus.open(copy).read_block(built.blocks("train")[0])


PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)


def stumbling_reads(monkeypatch, number, times):
    """Every row group and every small file of a corpus is read only after so many errors."""
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        stumbling(pq.ParquetFile.read_row_group, number, times),
    )
    monkeypatch.setattr(pq.ParquetFile, "read", stumbling(pq.ParquetFile.read, number, times))
    monkeypatch.setattr(Path, "read_bytes", stumbling(Path.read_bytes, number, times))
    digest = stumbling(hashlib.file_digest, number, times)
    monkeypatch.setattr(hashlib, "file_digest", digest)


@pytest.mark.parametrize("number", PASSING)
def test_a_file_system_that_stumbles_is_asked_again(built, monkeypatch, number):
    expected = built.read_block(built.blocks("train")[0])
    pauses = hurry(monkeypatch)
    stumbling_reads(monkeypatch, number, TRIES - 1)
    opened = Corpus.open(built.path)
    found = opened.read_block(opened.blocks("train")[0])
    assert (found.residues == expected.residues).all()
    opened.verify()
    assert len(pauses) == 4 * (TRIES - 1)
    assert pauses[: TRIES - 1] == sorted(set(pauses)), "each pause is longer"


@pytest.mark.parametrize("number", PASSING)
def test_what_stumbles_on_is_no_damage_and_may_pass(built, monkeypatch, number):
    hurry(monkeypatch)
    block = built.blocks("train")[0]
    stumbling_reads(monkeypatch, number, 10**6)
    for action in (
        lambda: built.read_block(block),
        lambda: Corpus.open(built.path),
        lambda: Corpus(built.files, built.manifest).blocks("train"),
        built.verify,
    ):
        with pytest.raises(PassingTrouble, match="cannot be read") as caught:
            action()
        assert os.strerror(number) in str(caught.value)
        assert "damaged" not in str(caught.value)


def test_what_a_file_system_refuses_for_good_and_what_is_damaged_is_told_at_once(
    built, tmp_path, monkeypatch
):
    pauses = hurry(monkeypatch)
    block = built.blocks("train")[0]
    shutil.copytree(built.path, tmp_path / "cut")
    shard = tmp_path / "cut" / block["shard"]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CorpusError, match="the corpus is damaged"):
        Corpus.open(tmp_path / "cut").read_block(block)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", stumbling(id, errno.EACCES, 10**6))
    with pytest.raises(RaptideError, match="cannot be read") as caught:
        built.read_block(block)
    assert not isinstance(caught.value, (PassingTrouble, InputError))
    assert pauses == []


def test_a_missing_an_unfinished_and_a_foreign_corpus_are_refused(built, tmp_path):
    with pytest.raises(CorpusError, match="no finished corpus"):
        Corpus.open(tmp_path)
    manifest = built.manifest | {"format_version": 99}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match="format 99"):
        Corpus.open(tmp_path)


def test_a_bad_record_stops_the_build_and_leaves_nothing(tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n>b\nMK1\n")
    with pytest.raises(FastaError, match=r"a.fasta:3: record 'b'"):
        build_corpus([tmp_path / "a.fasta"], tmp_path / "corpus", BuildSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["a.fasta"]
    with pytest.raises(CorpusError, match="exists already"):
        build_corpus([tmp_path / "a.fasta"], tmp_path, BuildSettings())
