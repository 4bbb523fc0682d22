"""Tables of domains: what they say, and what is wrong with them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raptide.errors import InputError
from raptide.evaluation.datasets.domains import read_domains


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def scope(path, **changed):
    columns = {
        "id": ["d1", "d2"],
        "scop_class": ["a.1.2.3", "c.30.1.0"],
        "sequence": ["mktay", "ACDE FJ*"],
    }
    return table(path, **(columns | changed))


def test_levels_of_scope(tmp_path):
    domains = read_domains(scope(tmp_path / "d.parquet"))
    assert domains.scheme == "SCOPe"
    assert domains.labels("fold") == ["a.1", "c.30"]
    assert domains.labels("superfamily") == ["a.1.2", "c.30.1"]
    assert domains.labels("family") == ["a.1.2.3", "c.30.1.0"]
    assert domains.sequences == ["MKTAY", "ACDEFX"]


def test_levels_of_cath(tmp_path):
    path = table(tmp_path / "d.parquet", id=["x"], cath=["3.40.50.720"], sequence=["MK"], other=[1])
    domains = read_domains(path)
    assert domains.scheme == "CATH"
    assert domains.labels("fold") == ["3.40.50"]
    assert domains.labels("superfamily") == ["3.40.50.720"]
    assert domains.labels("family") is None


def test_csv_is_read_as_parquet_is(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("sequence,id,note,scop_class\nMKTAY,1,x,a.1.2.3\nACDEF,2,y,b.70.1.10\n")
    domains = read_domains(path)
    assert domains.ids == ["1", "2"]
    assert domains.labels("family") == ["a.1.2.3", "b.70.1.10"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"id": ["d1", None]}, r"row 2 of .*d\.parquet has none"),
        ({"id": ["d1", "d1"]}, r"rows 1 and 2 of .* are both 'd1'"),
        ({"scop_class": ["a.1.2.3", "a.1.2"]}, r"row 2 of .* holds 'a\.1\.2'"),
        ({"scop_class": ["3.40.50.720", "a.1.2.3"]}, r"row 1 of .* holds '3\.40\.50\.720'"),
        ({"scop_class": ["a.1.2.3", None]}, r"row 2 of .* holds ''"),
        ({"sequence": ["MKTAY", "MK1"]}, r"Row 2 of .*d\.parquet: .* position 3 holds '1'"),
        ({"sequence": [None, "MK"]}, r"Row 1 of .*: A sequence needs at least one residue"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changed, message):
    with pytest.raises(InputError, match=message) as caught:
        read_domains(scope(tmp_path / "d.parquet", **changed))
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named_with_those_there(tmp_path):
    path = table(tmp_path / "d.parquet", id=["x"], sequence=["MK"], fold=["a.1"])
    with pytest.raises(InputError, match=r"has no scop_class or cath among id, sequence, fold"):
        read_domains(path)
    path = table(tmp_path / "e.parquet", id=["x"], cath=["1.2.3.4"], seq=["MK"])
    with pytest.raises(InputError, match=r"has no sequence among id, cath, seq"):
        read_domains(path)


def test_what_is_no_table_of_domains_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        read_domains(tmp_path / "none.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="neither a whole Parquet file nor CSV"):
        read_domains(broken)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("id,cath,sequence\nx,1.2.3.4\n")
    with pytest.raises(InputError, match="neither a whole Parquet file nor CSV"):
        read_domains(ragged)
    (tmp_path / "empty.csv").write_text("id,cath,sequence\n")
    with pytest.raises(InputError, match="holds no domains"):
        read_domains(tmp_path / "empty.csv")
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(InputError):
        read_domains(tmp_path / "nothing.csv")


def test_a_column_that_stands_there_twice_is_refused(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("id,id,scop_class,sequence\na,b,a.1.1.1,MKT\n")
    with pytest.raises(InputError, match="more than one column 'id'"):
        read_domains(path)
