"""Lists of held-out clusters as their authors publish them."""

import bz2
import gzip
import os
import threading

import pyarrow.parquet as pq
import pytest
from backports import zstd
from draws import generator, random_sequence

from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.heldout import read_list
from raptide.errors import ConfigError

LIST = (
    "UniRef50_A0A1\n>UniRef50_B Cluster: x n=3 Tax=Homo sapiens\r\n\nUniRef50_C some protein n=1\n"
    "Homo sapiens \n>sp|P1|X_HUMAN a\nUniRef100_UPI0001"
)
NAMES = [
    *("UniRef50_A0A1", "UniRef50_B", "UniRef50_C", "Homo sapiens"),
    *("sp|P1|X_HUMAN", "UniRef100_UPI0001"),
]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, zstd.compress])
def test_a_list_is_read_as_it_is(tmp_path, compress):
    file = tmp_path / "list"
    file.write_bytes(compress(LIST.encode()))
    assert read_list(file).to_pylist() == NAMES


def test_a_list_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = gzip.compress(LIST.encode())
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content]).start()
    assert read_list(tmp_path / "pipe").to_pylist() == NAMES


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\n", gzip.compress(b"a\n" * 999)[:-9]])
def test_a_list_without_names_or_damaged_is_refused(tmp_path, content):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(ConfigError, match=r"list (holds no names|cannot be read)"):
        read_list(tmp_path / "list")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("clusters_by", ["table", "header"])
def test_clusters_of_listed_members_are_held_out_whole(tmp_path, clusters_by):
    members = {
        f"UniRef50_P{number}": [f"UniRef100_P{number}m{m}" for m in range(4)]
        for number in range(10)
    }
    tag = {name: cluster for cluster, names in members.items() for name in names}
    records = [
        f">{name} c={tag[name] if clusters_by == 'header' else ''}\n{random_sequence(30)}\n"
        for name in generator().permutation(list(tag)).tolist()
    ]
    (tmp_path / "a.fasta").write_text("".join(records))
    (tmp_path / "t.tsv").write_text("".join(f"{tag[name]}\t{name}\n" for name in tag))
    # One member of one cluster, all of another, a third by its name, and what is not there.
    listed = ["UniRef100_P3m2", *members["UniRef50_P7"], "UniRef50_P8", "UniRef100_gone"]
    (tmp_path / "list.gz").write_bytes(gzip.compress("\n".join(listed).encode()))
    said = []
    corpus = build_corpus(
        [tmp_path / "a.fasta"],
        tmp_path / "c",
        BuildSettings(holdout_fraction=0, cluster_tag="c" if clusters_by == "header" else None),
        cluster_tables=[tmp_path / "t.tsv"] if clusters_by == "table" else [],
        heldout_clusters=read_list(tmp_path / "list.gz"),
        say=said.append,
    )
    split = {}
    for shard in corpus.manifest["shards"]:
        for row in pq.read_table(corpus.path / shard["name"]).to_pylist():
            split.setdefault(shard["split"], {})[row["cluster"]] = sorted(row["ids"])
    heldout = {"UniRef50_P3", "UniRef50_P7", "UniRef50_P8"}
    assert split["heldout"] == {cluster: members[cluster] for cluster in heldout}
    assert split["train"].keys() == members.keys() - heldout
    assert "Held out by name: 3 clusters" in said
    assert "Not in the input: 1 of the listed clusters (UniRef100_gone)" in said
    assert corpus.manifest["listed_heldout_clusters"] == 7
    assert corpus.manifest["listed_heldout_clusters_found"] == 3
