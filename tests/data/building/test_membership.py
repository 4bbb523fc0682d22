"""Clusters from tables instead of headers."""

import gzip
import random
import re

import pytest
from backports import zstd

from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.membership import read_membership
from raptide.errors import CorpusError


@pytest.fixture(scope="module")
def records():
    """(name, cluster, FASTA text) with the cluster in the header; some are in none."""
    rng = random.Random(7)
    made = []
    for cluster in range(50):
        for member in range(rng.choice([1, 2, 7])):
            name = f"UniRef100_{cluster}m{member}"
            letters = "".join(rng.choices("LAGVSERTIDPKQNFYMHWC", k=rng.randint(20, 90)))
            own = "" if cluster % 10 == 0 else f"UniRef100_{cluster}m0"
            tag = f" cluster50={own}" if own else ""
            made.append((name, own, f">{name} n=1 Tax=x{tag}\n{letters}\n"))
    return made


def build(folder, records, tables=(), **settings):
    folder.mkdir()
    (folder / "a.fasta").write_text("".join(text for _, _, text in records))
    files = []
    for number, content in enumerate(tables):
        files.append(folder / f"{number}_cluster.tsv")
        files[-1].write_bytes(content)
    return build_corpus(
        [folder / "a.fasta"],
        folder / "corpus",
        BuildSettings(block_residues=2048, **settings),
        cluster_tables=files,
    )


def lines(records):
    return [f"{cluster}\t{name}\n" for name, cluster, _ in records if cluster]


@pytest.mark.usefixtures("cluster")
def test_a_table_gives_the_corpus_that_headers_give(records, tmp_path):
    by_header = build(tmp_path / "header", records, cluster_tag="cluster50")
    bare = [(name, own, re.sub(r" cluster50=\S+", "", text)) for name, own, text in records]
    rows = random.Random(1).sample(lines(records), len(lines(records)))
    rows += rows[:3]  # a line that is there twice says nothing new
    half = len(rows) // 2
    tables = ["".join(rows[:half]).encode(), "".join(rows[half:]).encode()]
    compressed = [gzip.compress(tables[0]), zstd.compress(tables[1])]
    by_table = build(tmp_path / "table", bare, compressed)
    assert by_table.digest == by_header.digest
    assert by_table.manifest["counts"] == by_header.manifest["counts"]
    names = [entry["name"] for entry in by_table.manifest["inputs"]]
    assert names == ["0_cluster.tsv", "1_cluster.tsv", "a.fasta"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("UniRef100_1m0\tnobody\n", "names the member 'nobody', which no record of the input"),
        (
            "UniRef100_2m0\tUniRef100_1m0\n",
            "'UniRef100_1m0' into two clusters, 'UniRef100_1m0' and",
        ),
        ("UniRef100_1m0 UniRef100_1m0\n", "0_cluster.tsv is no cluster table"),
        ("a\tb\tc\n", "0_cluster.tsv is no cluster table"),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_a_table_that_does_not_fit_is_refused_in_one_sentence(records, tmp_path, extra, message):
    table = "".join([*lines(records), extra]).encode()
    with pytest.raises(CorpusError, match=message) as caught:
        build(tmp_path / "a", records, [table])
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0_cluster.tsv", "a.fasta"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no cluster table"),
        (gzip.compress(b"a\tb\n" * 9999)[:-40], "is no cluster table"),
        (b"a\t\xff\n", "is no cluster table"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, content, message):
    file = tmp_path / "t.tsv"
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(read_membership(file))
    with pytest.raises(CorpusError, match=message):
        list(read_membership(tmp_path / "gone.tsv"))
