"""Scans as files: both forms, what is left out, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scans
from conftest import ROOT

from raptide.errors import InputError
from raptide.evaluation.datasets.assays import find_files, read_assay, read_assays

TARGET = "MKTAYIAKQR"


def test_parquet_and_csv_say_the_same(tmp_path):
    mutants = ["K2A", "T3G:Q9E", "R10K"]
    parquet = scans.write_parquet(tmp_path / "one.parquet", TARGET, mutants, [1.5, -2, 0])
    rows = [
        (m, scans.mutate(TARGET, m), s, b) for m, s, b in zip(mutants, "302", "100", strict=True)
    ]
    table = scans.write_csv(tmp_path / "two.csv", rows)
    one, two = read_assays([parquet, table])
    assert (one.name, two.name) == ("one", "two")
    assert one.target == two.target == TARGET
    assert one.mutants == two.mutants == mutants
    assert one.scores.tolist() == [1.5, -2, 0]
    assert two.scores.tolist() == [3, 0, 2]
    assert one.bins is None
    assert one.fit.tolist() == [True, False, True]  # not below the median, 0
    assert two.fit.tolist() == [True, False, False]
    assert [each.tolist() for each in one.changes] == [
        [0, 1, 1, 2],
        [1, 2, 8, 9],
        [8, 16, 13, 14],  # K, T, Q, R among the letters in alphabetical order
        [0, 5, 3, 8],
    ]
    assert [one.sequence(i) for i in range(3)] == [scans.mutate(TARGET, m) for m in mutants]


def test_the_protein_itself_is_left_out(tmp_path):
    mutants = ["WT", "K2A", "", "_wt", "K2K", "A4A:Q9E", None]
    path = scans.write_parquet(tmp_path / "a.parquet", TARGET, mutants, [0, 1, 0, 0, 0, 2, 0])
    assay = read_assay(path)
    assert assay.mutants == ["K2A", "Q9E"]
    assert assay.scores.tolist() == [1, 2]


def test_substitutions_are_spelled_in_order(tmp_path):
    path = scans.write_parquet(tmp_path / "a.parquet", TARGET, ["q9e:k2a"], [1.0])
    assert read_assay(path).mutants == ["K2A:Q9E"]


def test_the_reference_gives_targets_and_groups(tmp_path):
    rows = [("K2A", "anything", 1, 1), ("K2R", "anything", 2, 0)]
    table = scans.write_csv(tmp_path / "ABC_YEAST_Who_2020.csv", rows)
    reference = scans.write_csv(
        tmp_path / "reference.csv",
        [
            ("X", "X.csv", "GGG", "X_HUMAN", "Binding"),
            ("ABC", table.name, TARGET, "ABC_YEAST", "Stability"),
        ],
        ("DMS_id", "DMS_filename", "target_seq", "UniProt_ID", "coarse_selection_type"),
    )
    (assay,) = read_assays([table], reference)
    assert (assay.name, assay.target) == ("ABC", TARGET)
    assert (assay.protein, assay.selection) == ("ABC_YEAST", "Stability")
    other = scans.write_csv(tmp_path / "Y.csv", rows)
    with pytest.raises(InputError, match=r"Y\.csv has no row in `reference`"):
        read_assays([other], reference)


def test_variants_of_one_set_of_positions_are_a_unit(tmp_path):
    mutants = ["K2A", "K2R", "T3G", "K2A:T3G", "T3A:K2R", "K2A:Q9E"]
    path = scans.write_parquet(tmp_path / "a.parquet", TARGET, mutants, range(6))
    assay = read_assay(path)
    assert assay.units.tolist() == [0, 0, 1, 2, 2, 3]
    part = assay.take(np.array([0, 3, 5]))
    assert part.mutants == ["K2A", "K2A:T3G", "K2A:Q9E"]
    assert part.scores.tolist() == [0, 3, 5]
    assert part.changes.variant.tolist() == [0, 1, 1, 2, 2]
    assert [part.sequence(i) for i in range(3)] == [assay.sequence(i) for i in (0, 3, 5)]


PLAIN = [("K2A", "MATAYIAKQR", "1.5", "1"), ("T3G", "MKGAYIAKQR", "0.5", "0")]
COLUMNS = ("mutant", "mutated_sequence", "DMS_score", "DMS_score_bin")

FLAWS = {
    "no mutant": ([("1",)], ("DMS_score",), "needs a column mutant"),
    "no score": (PLAIN, ("mutant", "mutated_sequence", "x", "y"), "needs a column score or DMS_"),
    "no target": ([("K2A", 1)], ("mutant", "DMS_score"), "does not say which protein"),
    "misfit": ([*PLAIN, ("K9A", "MKTAYIAKAR", 1, 1)], COLUMNS, "row 3: .*expects K at position 9"),
    "outside": ([*PLAIN, ("K99A", "MKTAYIAKAR", 1, 1)], COLUMNS, "row 3: .*outside the sequence"),
    "no notation": ([*PLAIN, ("K9*", "MKTAYIAKAR", 1, 1)], COLUMNS, "row 3: .*written like A42G"),
    "unknown letter": ([*PLAIN, ("Q9X", "MKTAYIAKXR", 1, 1)], COLUMNS, "row 3: .*but Q9X has X"),
    "no number": ([*PLAIN, ("Q9A", "MKTAYIAKAR", "high", 1)], COLUMNS, "row 3: .*'high'"),
    "not finite": ([*PLAIN, ("Q9A", "MKTAYIAKAR", "nan", 1)], COLUMNS, "row 3: .*'nan'"),
    "no bin": ([*PLAIN, ("Q9A", "MKTAYIAKAR", "1", "2")], COLUMNS, "row 3: a bin is 1"),
    "twice": ([*PLAIN, PLAIN[0]], COLUMNS, "row 3 has K2A again after row 1"),
    "another protein": ([*PLAIN, ("Q9A", "MKTWYIAKAR", 1, 1)], COLUMNS, "row 3: mutated_sequence"),
    "misshapen": ([*PLAIN, ("Q9A", "MKTAYIAKAR")], COLUMNS, "Row #4: Expected 4 columns, got 2"),
    "nothing": ([("WT", "MKTAYIAKQR", 1, 1)], COLUMNS, "does not say which protein"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_what_is_wrong_is_one_sentence_with_file_and_row(tmp_path, flaw):
    rows, header, message = FLAWS[flaw]
    path = scans.write_csv(tmp_path / "flawed.csv", rows, header)
    with pytest.raises(InputError, match=message) as caught:
        read_assay(path)
    assert str(caught.value).startswith(str(path)) or f"{path}, row" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="nothing matches"):
        find_files(str(tmp_path / "*.csv"))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="neither a whole Parquet file nor CSV"):
        read_assay(broken)
    with pytest.raises(InputError, match="cannot be read"):
        read_assay(tmp_path / "absent.csv")
    empty = scans.write_parquet(tmp_path / "empty.parquet", TARGET, ["WT"], [0.0])
    with pytest.raises(InputError, match="holds no variant"):
        read_assay(empty)


def test_two_files_of_one_name_are_refused(tmp_path):
    one = scans.write_parquet(tmp_path / "a.parquet", TARGET, ["K2A"], [1.0])
    two = scans.write_parquet(tmp_path / "b.parquet", TARGET, ["K2A"], [1.0], assay="a")
    with pytest.raises(InputError, match="another 'a'"):
        read_assays([one, two])


def test_what_parquet_may_hold_in_place_of_text(tmp_path):
    def write(name, metadata=None, **columns):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
        return path

    columns = {"mutant": ["K2A", "T3G"], "score": [1.0, 2.0]}
    for cell in (None, ""):
        path = write("none", **columns, mutated_sequence=[cell, "MKGAYIAKQR"])
        with pytest.raises(InputError, match=r"none\.parquet"):
            read_assay(path)
    path = write("null", **columns, mutated_sequence=["MATAYIAKQR", None])
    with pytest.raises(InputError, match="row 2: mutated_sequence must be text, but None"):
        read_assay(path)
    path = write("int", **columns, mutated_sequence=[1, 2])
    with pytest.raises(InputError, match="row 1: mutated_sequence must be text, but 1"):
        read_assay(path)
    path = write("bytes", {b"\xff": b"\xfe", "target_sequence": TARGET}, **columns)
    assert read_assay(path).mutants == ["K2A", "T3G"]


def test_no_assay_is_called_as_their_mean(tmp_path):
    path = scans.write_parquet(tmp_path / "all.parquet", TARGET, ["K2A"], [1.0])
    with pytest.raises(InputError, match="'all' is what the mean over assays is called"):
        read_assays([path])


def test_the_shipped_scans_open():
    files = find_files(f"{ROOT}/jobs/benchmarks/tiny/variants/*.parquet")
    assays = {each.name: each for each in read_assays(files)}
    assert {name: len(each.mutants) for name, each in assays.items()} == {
        "PABP_YEAST": 1188,
        "DLG4_RAT": 1577,
    }
