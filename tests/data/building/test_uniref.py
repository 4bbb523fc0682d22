"""UniRef's clusters with entries of UniParc alone, and what becomes of those no table names."""

import io
import re
import tracemalloc

import pyarrow.parquet as pq
import pytest
from draws import generator, random_sequence

from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.uniref import read_members
from raptide.errors import CorpusError, InputError

HEAD = (
    '<?xml version="1.0" encoding="ISO-8859-1" ?>\n<UniRef50 xmlns="http://uniprot.org/uniref"'
    ' releaseDate="2026-10-07" version="2026_04">\n'
)


def reference(kind, name, tag="member"):
    """A member as UniRef writes it; `name` is its accession or its UniParc ID."""
    return (
        f'<{tag}>\n<dbReference type="{kind} ID" id="{name}_X">\n'
        f'<property type="UniRef100 ID" value="UniRef100_{name}"/>\n'
        f'<property type="UniRef90 ID" value="UniRef90_{name[:4]}"/>\n'
        f'<property type="protein name" value="a &lt; b &#38; c"/>\n</dbReference>\n</{tag}>\n'
    )


def entry(cluster, members):
    text = f'<entry id="UniRef50_{cluster}" updated="2026-10-07">\n<name>Cluster: x</name>\n'
    text += '<property type="member count" value="2"/>\n'
    for number, name in enumerate(members):
        kind = "UniParc" if name.startswith("UPI") else "UniProtKB"
        text += reference(kind, name, "member" if number else "representativeMember")
    return text + "</entry>\n"


def lines(xml, kind="UniRef100"):
    file = io.BytesIO(xml.encode("latin-1"))
    return [line for some in read_members(file, kind) for line in some]


@pytest.fixture
def clusters():
    """Accession of each cluster: its members, some of UniParc alone."""
    made = {}
    for number in range(12):
        members = [f"P{number:03}M{m}" for m in range(generator().integers(1, 4))]
        extra = [f"UPI{number:03}M{m}" for m in range(generator().integers(1, 4))]
        made[members[0]] = members + extra
    return made


def whole_xml(clusters):
    return HEAD + "".join(entry(*each) for each in clusters.items()) + "</UniRef50>\n"


def test_every_member_is_named_also_those_of_uniparc_alone(clusters):
    pairs = {
        (f"UniRef50_{cluster}", f"UniRef100_{name}")
        for cluster, members in clusters.items()
        for name in members
    }
    found = lines(whole_xml(clusters))
    assert {tuple(line.rstrip("\n").split("\t")) for line in found} == pairs
    assert len(found) == len(pairs)
    nineties = lines(whole_xml(clusters), "UniRef90")
    assert {line.split("\t")[1] for line in nineties} == {
        f"UniRef90_{name[:4]}\n" for members in clusters.values() for name in members
    }


def test_a_cluster_of_a_hundred_thousand_members_takes_no_more_memory():
    class Giant(io.RawIOBase):
        """One entry's XML, made while it is read."""

        def __init__(self):
            self.parts = iter(
                [HEAD, entry("P", ["P"]).removesuffix("</entry>\n")]
                + [None] * 100
                + ["</entry></UniRef50>"]
            )
            self.made = 0

        def read(self, size):
            part = next(self.parts, "")
            if part is None:
                names = range(self.made, self.made + 1000)
                self.made += 1000
                part = "".join(reference("UniParc", f"UPI{n:010}") for n in names)
            return part.encode()

    tracemalloc.start()
    found = sum(map(len, read_members(Giant(), "UniRef100")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 100_001
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda xml: xml[: len(xml) // 2], "no whole XML"),
        (lambda xml: xml + "<x>", "no whole XML"),
        (lambda xml: xml.replace("UniRef100 ID", "UniRef10 ID"), "no XML of UniRef"),
        (lambda xml: xml.replace('value="UniRef100_P000M0"', 'value="a&#9;b"'), "is no name"),
        (lambda xml: re.sub(r'id="UniRef50_\w+"', "", xml, count=1), "is no name"),
        (
            lambda xml: xml.replace(
                "<UniRef50", '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><UniRef50', 1
            ),
            "document type",
        ),
    ],
)
def test_a_file_that_is_no_whole_xml_of_uniref_is_refused(clusters, damage, message):
    with pytest.raises(InputError, match=message):
        lines(damage(whole_xml(clusters)))


@pytest.fixture
def build(clusters, tmp_path):
    """Build with a table and half of the clusters held out by name; what was said, too."""
    fasta = tmp_path / "a.fasta"
    names = [name for members in clusters.values() for name in members]
    fasta.write_text("".join(f">UniRef100_{n} n=1\n{random_sequence(40)}\n" for n in names))
    listed = [f"UniRef50_{cluster}" for cluster in list(clusters)[::2]]

    def build(name, table, **settings):
        file = tmp_path / f"{name}.tsv"
        file.write_text("".join(table))
        said = []
        corpus = build_corpus(
            [fasta],
            tmp_path / name,
            BuildSettings(holdout_fraction=0, **settings),
            cluster_tables=[file],
            heldout_clusters=listed,
            say=said.append,
        )
        return corpus, said

    return build


def training_names(corpus):
    shards = [each for each in corpus.manifest["shards"] if each["split"] == "train"]
    rows = [row for each in shards for row in pq.read_table(corpus.path / each["name"]).to_pylist()]
    return {name.removeprefix("UniRef100_") for row in rows for name in row["ids"]}


@pytest.mark.usefixtures("cluster")
def test_no_relative_of_a_held_out_cluster_is_trained_on(clusters, build):
    relatives = {name for cluster in list(clusters)[::2] for name in clusters[cluster]}
    others = {name for members in clusters.values() for name in members} - relatives
    whole = lines(whole_xml(clusters))
    of_uniprotkb = [line for line in whole if "UPI" not in line]
    lost = {name for name in relatives | others if name.startswith("UPI")}

    corpus, _ = build("complete", whole, unclustered="refuse")
    assert training_names(corpus) == others
    assert corpus.manifest["dropped"] == {}

    corpus, _ = build("dropped", of_uniprotkb, unclustered="drop")
    assert training_names(corpus) == others - lost
    assert corpus.manifest["dropped"] == {"unclustered": len(lost)}
    first = next(name for members in clusters.values() for name in members if name in lost)
    assert corpus.manifest["dropped_first"]["unclustered"].startswith(f"'UniRef100_{first}' in a.")

    corpus, said = build("own", of_uniprotkb)
    assert training_names(corpus) & relatives, "these leak, and are said"
    assert f"{len(lost)} kept records are in no cluster" in " ".join(said)
    assert corpus.manifest["unclustered"] == len(lost)

    with pytest.raises(CorpusError, match=rf"{len(lost)} records are in no cluster, first '\w+'"):
        build("refused", of_uniprotkb, unclustered="refuse")


@pytest.mark.usefixtures("cluster")
def test_dropping_what_is_in_no_cluster_needs_clusters(tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n")
    with pytest.raises(CorpusError, match="--unclustered drop needs --clusters or --cluster-tag"):
        build_corpus([tmp_path / "a.fasta"], tmp_path / "c", BuildSettings(unclustered="drop"))
