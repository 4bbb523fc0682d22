import csv
import gzip
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import random_chains, write_chains

from raptide.errors import InputError
from raptide.evaluation.datasets.chains import Chains

BOTH = ("ss8", "cb_angstrom")


@pytest.fixture
def rows():
    return random_chains(100)


def as_csv(path, rows, joined="{}".format):
    texts = [
        row | {"cb_angstrom": joined(" ".join(map(str, np.float32(row["cb_angstrom"]))))}
        for row in rows
    ]
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        delimiter = "\t" if ".tsv" in path.name else ","
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(texts)
    return path


def assert_holds(chains, rows):
    assert len(chains) == len(rows)
    for chain, row in zip(chains, rows, strict=True):
        assert chain[:3] == (row["id"], row["sequence"], row["ss8"])
        assert chain.cb_angstrom.dtype == np.float32
        expected = np.float32(row["cb_angstrom"]).reshape(-1, 3)
        assert np.array_equal(chain.cb_angstrom, expected, equal_nan=True)
    assert chains.lengths.tolist() == [len(row["sequence"]) for row in rows]


def test_chains_are_read_from_any_kind_of_file(tmp_path, rows):
    assert_holds(Chains(write_chains(tmp_path / "a.parquet", rows), BOTH), rows)
    assert_holds(Chains(as_csv(tmp_path / "a.csv", rows), BOTH), rows)
    assert_holds(Chains(as_csv(tmp_path / "a.tsv.gz", rows), BOTH), rows)
    listed = as_csv(tmp_path / "b.csv", rows, lambda text: f"[{text.replace(' ', ', ')}]")
    assert_holds(Chains(listed, BOTH), rows)


def test_chains_are_taken_by_place(tmp_path, rows):
    chains = Chains(write_chains(tmp_path / "a.parquet", rows), BOTH)
    assert chains[-1].id == "chain99"
    assert [chain.id for chain in chains[3:9:2]] == ["chain3", "chain5", "chain7"]
    with pytest.raises(IndexError):
        chains[100]


def test_labels_that_are_not_asked_for_need_not_be_there(tmp_path, rows):
    for row in rows:
        del row["ss8"]
        row["other"] = 1
    path = write_chains(tmp_path / "a.parquet", rows)
    chain = Chains(path, ["cb_angstrom"])[5]
    assert (chain.id, chain.ss8, len(chain.cb_angstrom)) == ("chain5", "", len(chain.sequence))
    assert Chains(path, [])[5].cb_angstrom.shape == (0, 3)
    with pytest.raises(InputError, match=r"a\.parquet needs a column `ss8`, but has id, sequence"):
        Chains(path, BOTH)


def test_sequences_are_read_as_everywhere(tmp_path):
    row = {"id": "ä", "sequence": "mk jV*", "ss8": "HH-C", "cb_angstrom": [0.0] * 12}
    (chain,) = Chains(write_chains(tmp_path / "a.parquet", [row]), BOTH)
    assert chain.sequence == "MKXV"
    assert (chain.id, chain.ss8) == ("ä", "HH-C")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sequence": "MK1V"}, "position 3 holds '1'"),
        ({"sequence": ""}, "needs at least one residue"),
        ({"sequence": None}, "`sequence` must be text, not None"),
        ({"ss8": "HHH"}, "`ss8` needs a letter for each of the sequence's 4 residues, but has 3"),
        ({"ss8": None}, "residues, but is None"),
        ({"ss8": "HHLH"}, "`ss8` holds 'L' at residue 3, but its letters are H G I E B T S C"),
        ({"cb_angstrom": [0.0] * 11}, "4 residues, 12 in all, but has 11; write NaN"),
        ({"cb_angstrom": None}, "`cb_angstrom` must be a flat list of numbers, not 'None'"),
    ],
)
def test_a_bad_row_is_named_in_one_sentence(tmp_path, change, said):
    good = {"id": "a", "sequence": "MKLV", "ss8": "HHCC", "cb_angstrom": [0.0] * 12}
    path = write_chains(tmp_path / "a.parquet", [good] * 70 + [good | change] + [good])
    with pytest.raises(InputError) as error:
        Chains(path, BOTH)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{path}, row 71: ")
    assert "\n" not in str(error.value)


def test_a_bad_row_of_a_csv_file_is_named(tmp_path, rows):
    rows[8]["cb_angstrom"] = rows[8]["cb_angstrom"][:-1]
    with pytest.raises(InputError, match=r"a\.csv, row 9: `cb_angstrom` needs 3 numbers"):
        Chains(as_csv(tmp_path / "a.csv", rows), BOTH)
    path = as_csv(tmp_path / "b.csv", rows[:3], lambda text: "x" + text)
    with pytest.raises(InputError, match=r"b\.csv, row 1: `cb_angstrom` must be a flat list"):
        Chains(path, BOTH)


def test_what_is_no_table_is_refused(tmp_path, rows):
    (tmp_path / "a.parquet").write_text("id,sequence\n")
    (tmp_path / "b.csv").write_text("")
    for name in ("a.parquet", "b.csv", "missing.parquet", "missing.csv"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a table of chains: .*give"):
            Chains(tmp_path / name, BOTH)
    pq.write_table(pa.table({"id": ["a"], "sequence": ["M"]}).slice(0, 0), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet holds no chain"):
        Chains(tmp_path / "c.parquet", [])


def test_draws_and_cuts_go_by_the_sequence_alone(tmp_path, rows):
    rows += [row | {"id": row["id"] + "again"} for row in rows[:30]]
    one = Chains(write_chains(tmp_path / "a.parquet", rows), [])
    other = Chains(write_chains(tmp_path / "b.parquet", rows[::-1]), [])
    cuts = []
    for chains in (one, other):
        drawn = chains.draw(np.arange(len(chains)), 65)
        assert len(drawn) == 65
        train, valid = chains.cut(drawn)
        assert sorted([*train, *valid]) == drawn.tolist()
        assert 7 <= len(valid) <= 8  # one more where its double is cut along
        sides = [{chains[i].sequence for i in side} for side in (train, valid)]
        assert not sides[0] & sides[1]
        cuts.append(sides)
    assert cuts[0] == cuts[1]
    smaller = {one[i].sequence for i in one.draw(np.arange(len(one)), 20)}
    assert smaller < cuts[0][0] | cuts[0][1]
    assert len(one.draw(np.arange(len(one)), None)) == 130


def test_memory_does_not_grow_with_a_file(tmp_path):
    path = write_chains(tmp_path / "a.parquet", random_chains(40, shortest=2000, longest=2000))
    tracemalloc.start()
    chains = Chains(path, BOTH)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(chains) == 40
    assert held < 40 * 2000  # a byte a residue, of 14


def test_a_column_that_stands_there_twice_is_refused(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("id,id,sequence,ss8\na,b,MKT,CCC\n")
    with pytest.raises(InputError, match="more than one column `id`"):
        Chains(path, ("ss8",))
