"""Files and tables as people have them: what is dropped is named, what is listed is found."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.records import plain_names, tagged_clusters
from raptide.data.fasta import ReadingRules, read_fasta
from raptide.errors import CorpusError

pytestmark = pytest.mark.usefixtures("cluster")


def build(folder, content, *, tables=(), listed=(), said=None, **settings):
    folder.mkdir(exist_ok=True)
    file = folder / "a.fasta"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = []
    for number, table in enumerate(tables):
        paths.append(folder / f"{number}.tsv")
        paths[-1].write_bytes(table if isinstance(table, bytes) else table.encode())
    return build_corpus(
        [file],
        folder / "corpus",
        BuildSettings(**{"holdout_fraction": 0.0} | settings),
        cluster_tables=paths,
        heldout_clusters=listed,
        say=(said if said is not None else []).append,
    )


def names(corpus, split="train"):
    rows = []
    for shard in corpus.manifest["shards"]:
        if shard["split"] == split:
            rows += pq.read_table(corpus.path / shard["name"]).to_pylist()
    return {row["cluster"]: row["ids"] for row in rows}


def test_what_is_dropped_is_counted_by_reason_and_its_first_named(tmp_path):
    content = (
        b">a\nMKWLV\n>caf\xe9\nMKWLI\n>b\nMK*W\n>c\nMW.W\n>d\nMK1\n>e mol:na\nACGT\n>f\nMKWLVV\n"
    )
    rules = ReadingRules(stop_codons="drop", bad_letters="drop", nucleotides="drop")
    corpus = build(tmp_path / "a", content, reading=rules)
    assert set(names(corpus)) == {"a", "café", "f"}
    assert corpus.manifest["dropped"] == {"stop_codon": 2, "bad_letters": 1, "nucleotides": 1}
    assert corpus.manifest["dropped_first"] == {
        "stop_codon": "'b' in a.fasta:5",
        "bad_letters": "'d' in a.fasta:9",
        "nucleotides": "'e' in a.fasta:11",
    }
    assert (corpus.manifest["read"], corpus.manifest["latin1_headers"]) == (7, 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a a a#2 a", {"a", "a#2", "a##2", "a##3"}),
        ("a a b", {"a", "a#2", "b"}),
        ("a a a##7 a#2", {"a", "a###2", "a##7", "a#2"}),
    ],
)
def test_numbered_duplicates_never_meet_a_name_of_the_input(tmp_path, given, expected):
    letters = ["MKWLV", "MKWLI", "MKWLF", "MKWLY"]
    text = "".join(f">{n}\n{s}\n" for n, s in zip(given.split(), letters, strict=False))
    assert set(names(build(tmp_path / "a", text))) == expected


@pytest.mark.parametrize(
    ("header", "listed"),
    [
        ("sp|P1|A_HUMAN", "P1"),
        ("P1", "sp|P1|A_HUMAN"),
        ("tr|P1|A_HUMAN", "sp|P1|A_HUMAN"),
        ("P1", "P1"),
        ("gi|7|ref|P1|", "P1"),
    ],
)
def test_listed_clusters_are_found_in_any_spelling(tmp_path, header, listed):
    said = []
    text = f">{header} x\nMKWLV\n>other\nMKWLI\n"
    corpus = build(tmp_path / "a", text, listed=[listed, "gone1", "gone2"], said=said)
    assert set(names(corpus, "heldout")) == {header}
    assert corpus.manifest["listed_heldout_clusters_found"] == 1
    assert "Held out by name: 1 clusters" in said
    assert "Not in the input: 2 of the listed clusters (gone1, gone2)" in said


def test_a_list_that_names_no_cluster_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"None of the 2 clusters listed .* \('x', for one\)"):
        build(tmp_path / "a", ">a\nMKWLV\n", listed=["x", "y"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["a.fasta"]


def test_a_tag_that_no_header_has_is_refused_and_one_that_some_have_is_said(tmp_path):
    said = []
    text = ">a cluster=x\nMKWLV\n>b cluster=x\nMKWLI\n>c\nMKWLF\n"
    with pytest.raises(CorpusError, match="No header has the field clusters="):
        build(tmp_path / "a", text, cluster_tag="clusters")
    corpus = build(tmp_path / "b", text, cluster_tag="cluster", said=said)
    assert {name: len(ids) for name, ids in names(corpus).items()} == {"x": 2, "c": 1}
    assert "2 of 3 records have cluster=; each other one is its own cluster" in said


@pytest.mark.parametrize(
    ("description", "tag", "value"),
    [
        ("ID=1_1;partial=00;start_type=ATG", "ID", "1_1"),
        ("ID=1_1;partial=00;start_type=ATG", "partial", "00"),
        ("ID=S1 annot-version=v2.2", "ID", "S1"),
        ("Tax=Homo sapiens TaxID=9606", "Tax", "Homo sapiens"),
        ("gene.name=x ID=S 1 x.y=2", "ID", "S 1"),
        ("# 1 # 99 # ID=5_2;x=1", "ID", "5_2"),
        ("noID=7", "ID", None),
        ("ID= x=2", "ID", None),
    ],
)
def test_where_the_value_of_a_tag_ends(tmp_path, description, tag, value):
    (tmp_path / "a.fasta").write_text(f">a {description}\nMKWLV\n")
    (batch,) = read_fasta(tmp_path / "a.fasta")
    assert tagged_clusters(batch, tag) == [value]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("sp|P69905|HBA_HUMAN", "P69905"),
        ("sp|P69905", "P69905"),
        ("tr|A0A1|X", "A0A1"),
        ("gi|15674171|ref|NP_268346.1|", "NP_268346.1"),
        ("gi|1|gb|AAA1.1|LOCUS", "AAA1.1"),
        ("gi|1|emb|CAA1.1|", "CAA1.1"),
        ("gi|1|dbj|BAA1.1|", "BAA1.1"),
        ("gi|77", "gi|77"),
        ("ref|NP_1.1|", "NP_1.1"),
        ("gb|AAA1|x", "AAA1"),
        ("pdb|1ABC|A", "1ABC"),
        ("lcl|mine", "mine"),
        ("gnl|db|mine|x", "mine"),
        ("pir||S1234", "S1234"),
        ("prf||0806162C", "0806162C"),
        ("cl|c1|x", "c1"),
        ("ucA1", "A1"),
        ("consensus_P1|x", "P1|x"),
        ("consensus_sp|P1|X", "P1"),
        ("UniRef100_P69905", "UniRef100_P69905"),
        ("emb|CAA1.1|", "emb|CAA1.1|"),
        ("A|B", "A|B"),
    ],
)
def test_names_are_those_of_mmseqs2(header, name):
    assert plain_names(pa.array([header])).to_pylist() == [name]


def test_one_name_of_a_table_may_stand_for_several_records(tmp_path):
    text = ">pdb|1ABC|A\nMKWLV\n>pdb|1ABC|B\nMKWLI\n>pdb|2ABC|A\nMKWLF\n"
    corpus = build(tmp_path / "a", text, tables=["1ABC\t1ABC\n1ABC\t2ABC\n"])
    (ids,) = names(corpus).values()
    assert sorted(ids) == ["pdb|1ABC|A", "pdb|1ABC|B", "pdb|2ABC|A"]


def test_a_table_of_a_larger_set_can_be_given(tmp_path):
    text = ">a\nMKWLV\n>b\nMKWLI\n"
    table = gzip.compress(b"a\ta\na\tb\na\tgone\n")
    with pytest.raises(CorpusError, match=r"'gone'.*--clusters-of-a-larger-set"):
        build(tmp_path / "a", text, tables=[table])
    corpus = build(tmp_path / "b", text, tables=[table], clusters_of_a_larger_set=True)
    assert names(corpus) == {"a": ["a", "b"]}
    with pytest.raises(CorpusError, match="No line of the cluster tables names a record"):
        build(tmp_path / "c", text, tables=["x\ty\n"], clusters_of_a_larger_set=True)


@pytest.mark.parametrize("line", ["\tb\n", " \tb\n", "a\t\n"])
def test_a_line_without_a_representative_or_member_is_refused(tmp_path, line):
    with pytest.raises(CorpusError, match=r"0.tsv: the line of the .* names no"):
        build(tmp_path / "a", ">a\nMKWLV\n>b\nMKWLI\n", tables=["a\ta\n" + line])
