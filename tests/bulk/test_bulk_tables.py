"""Corpora and Parquet files as sources: any units' records are those of the whole."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from budgets import examples
from draws import generator, random_sequence
from hypothesis import given
from hypothesis import strategies as st

from raptide.alphabet import decode_residues
from raptide.bulk import find_sources
from raptide.bulk.sources.find import LENIENT
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.fasta import read_fasta
from raptide.errors import ConfigError


class Dear:
    """Eight records to a unit, or fewer."""

    def tokens(self, residues):
        return residues * 0 + 4096

    def output_bytes(self, residues):
        return residues


def read(source, units):
    return [records for part in source.stretches(units) for records in source.read(part)]


@pytest.fixture(scope="module")
def clustered(cluster, tmp_path_factory):
    """A corpus of 200 clusters of up to three proteins, and what each protein is."""
    folder = tmp_path_factory.mktemp("clustered")
    sequences = {f"p{n}": random_sequence(int(generator().integers(30, 90))) for n in range(400)}
    (folder / "a.fasta").write_text("".join(f">{n}\n{s}\n" for n, s in sequences.items()))
    rows = [f"p{2 * (n // 2)}\tp{n}\n" for n in range(400)]
    (folder / "clusters.tsv").write_text("".join(rows))
    settings = BuildSettings(block_residues=2000, holdout_fraction=0.3)
    corpus = build_corpus(
        [folder / "a.fasta"], folder / "c", settings, cluster_tables=[folder / "clusters.tsv"]
    )
    return corpus, sequences


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("sampling", ["representatives", "all"])
def test_a_corpus_gives_the_proteins_of_its_split(clustered, split, sampling):
    corpus, sequences = clustered
    (source,) = find_sources([corpus.path], LENIENT, split, sampling)
    survey = source.survey(0, Dear())
    counts = corpus.manifest["counts"][split]
    assert survey.records == counts["clusters" if sampling == "representatives" else "sequences"]
    whole = read(source, survey.units)
    assert len(whole) == len(survey.units) > 5
    assert [len(records.ids) for records in whole] == [unit.records for unit in survey.units]
    assert [sum(records.lengths) for records in whole] == [unit.residues for unit in survey.units]
    ids = [name for records in whole for name in records.ids]
    assert len(set(ids)) == len(ids)
    assert [sequences[name] for name in ids] == [each for r in whole for each in r.items]
    for _ in range(20):
        chosen = sorted(generator().choice(len(whole), 4, replace=False).tolist())
        assert read(source, [survey.units[i] for i in chosen]) == [whole[i] for i in chosen]
    other = find_sources([corpus.path], LENIENT, "train" if split == "heldout" else "heldout")
    assert other[0].survey(0, Dear()).digest != survey.digest


@examples(30)
@given(
    st.lists(st.one_of(st.none(), st.text("MKLVx* 1", max_size=9)), max_size=60),
    st.integers(1, 70),
    st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    st.data(),
)
def test_any_units_of_a_table_are_its_rows(tmp_path, letters, group, kind, data):
    table = pa.table(
        {
            "noise": pa.array([[n] for n in range(len(letters))], pa.list_(pa.int64())),
            "sequence": pa.array(letters, pa.string()).cast(kind),
            "id": pa.array(range(len(letters)), pa.int64()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=group)
    (source,) = find_sources([tmp_path / "t.parquet"])
    survey = source.survey(0, Dear())
    assert survey.records == len(letters)
    chosen = data.draw(st.sets(st.sampled_from(range(len(survey.units))))) if letters else set()
    some = [survey.units[index] for index in sorted(chosen)]
    for unit, records in zip(some, read(source, some), strict=True):
        places = range(unit.first, unit.first + unit.records)
        assert records.ids == [str(n) for n in places]
        assert records.lines == [n + 1 for n in places]
        for place, item, flaw in zip(places, records.items, records.flaws, strict=True):
            body = (letters[place] or "").upper().replace(" ", "").removesuffix("*")
            assert bool(flaw) == (not body or bool(set(body) & set("1*")))
            assert item == ("" if flaw else body)


def test_a_table_without_the_columns_or_cut_short_is_named(tmp_path):
    pq.write_table(pa.table({"name": ["a"], "sequence": ["MK"]}), tmp_path / "t.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    for name, message in [("t", "has no id among name, sequence"), ("cut", "no whole Parquet")]:
        (source,) = find_sources([tmp_path / f"{name}.parquet"])
        with pytest.raises(ConfigError, match=message):
            source.survey(0, Dear())


def test_large_rows_of_a_table(tmp_path):
    letters = ["M" * 3_000_000, "K", "L" * 40_000_000, "V"]
    pq.write_table(pa.table({"id": list("abcd"), "sequence": letters}), tmp_path / "t.parquet")
    (source,) = find_sources([tmp_path / "t.parquet"])
    units = source.survey(0, Dear()).units
    assert [unit.records for unit in units] == [2, 1, 1]
    assert [r.lengths for r in read(source, units[1:])] == [[40_000_000], [1]]


def test_proteome_as_fasta_reads_as_the_library_reads_it(proteome):
    (source,) = find_sources([proteome])
    units = source.survey(0, Dear()).units
    found = [pair for r in read(source, units) for pair in zip(r.ids, r.items, strict=True)]
    expected = []
    for batch in read_fasta(proteome):
        text, start = decode_residues(np.frombuffer(batch.residues, np.uint8)), 0
        for name, length in zip(batch.names, batch.lengths.tolist(), strict=True):
            expected.append((name, text[start : start + length]))
            start += length
    assert found == expected
