"""Tables of variants: whole and exact, scored as the engine scores, whatever a row holds."""

import csv
import gzip
import io
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import job_in_process

from raptide import Engine, InputError, SequenceError
from raptide.alphabet import encode_residues
from raptide.bulk import OutputFolder, VariantWork, find_tables, units, worker
from raptide.bulk.child import slices
from raptide.bulk.process import Death, Limits
from raptide.bulk.sources.rows import read_header, read_rows
from raptide.bulk.variants import _masked_marginals, read_item
from raptide.bulk.work import Model
from raptide.bulk.worker import UnitWorker, read_units
from raptide.calls.variants import parse_variant, spell_variant
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm

METHODS = ("wt-marginals", "masked-marginals", "pseudo-ppl")
SHORT, LONG = "MKTAYIAKQRQISFVKSHFSRQ", "MKLV" * 20
OFFSET = 10


def write_model(path, seed):
    settings = ModelSettings(family="esm1b", layers=1, width=8, heads=2, max_positions=64)
    write_weights(path, Weights.of(Esm(settings).initialise(seed)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m", 1)


def work_of(path, methods=("wt-marginals",)):
    names = tuple(f"raptide_{method}" for method in methods)
    return VariantWork((Model.find(path),), "fp32", "reject", tuple(methods), names)


# What a job does with tables of every kind.

WEIRD = (
    b'\xef\xbb\xbfNote,mutant,"sequence",extra,empty\r\n'
    b"NA,K12A,MKTAYIAKQRQISFVKSHFSRQ,007,\r\n"
    b'"two\nlines, ""quoted""",K12A:Q19E,mktayiakqrqisfvkshfsrq,1e5,\r\n'
    b"\r\n"
    b",_wt,MKTAYIAKQRQISFVKSHFSRQ,1.50,NULL\n"
    b"odd,A12K,MKTAYIAKQRQISFVKSHFSRQ,,\n"
    b"odd,K12A,MKT7,,\n"
    b"odd,K12A,,,\n"
    b"short,K12A\n"
    b"again,K12A,MKTAYIAKQRQISFVKSHFSRQ,\xff,"
)
WEIRD_VARIANTS = {0: "K2A", 1: "K2A:Q9E", 2: None, 7: "K2A"}
"""Scored rows of it, counted from 1 as the engine counts."""


def proteingym(rows, protein):
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["mutant", "mutated_sequence", "DMS_score"])
    for mutant in rows:
        letters = list(protein)
        for part in mutant.split(":") if mutant else ():
            assert letters[int(part[1:-1]) - 1] == part[0]
            letters[int(part[1:-1]) - 1] = part[-1]
        shifted = ":".join(f"{p[0]}{int(p[1:-1]) + OFFSET}{p[-1]}" for p in mutant.split(":") if p)
        table.writerow([shifted, "".join(letters), "0.5"])
    return text.getvalue().encode()


GYM = ["K2A", "K2C", "V80A", "M1A:K50R", "L43F", ""]
"""Variants of LONG, most of them seen through windows of 62 residues."""


@pytest.fixture(scope="module")
def scored(cluster, tmp_path_factory):
    """A folder in which all kinds of tables were scored by two models, and what was said."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "in/gym").mkdir(parents=True)
    (folder / "in/weird.csv").write_bytes(WEIRD)
    (folder / "in/gym/gym.csv").write_bytes(proteingym(GYM, LONG))
    (folder / "in/none.csv").write_bytes(b"sequence;mutant")
    (folder / "in/named.tsv.gz").write_bytes(
        gzip.compress(b"id\tmutant\nP1\tK12A\nP2\tK12A\nP3\tK12A\nP1\tk12c\n")
    )
    (folder / "p.fasta").write_text(f">P1 one\n{SHORT}\n>P2\nMKL\n>P2\nMKV\n")
    table = pa.table(
        {
            "mutant": pa.array(["Y15F", None, "Y15F:Y15A"]).dictionary_encode(),
            "twice": pa.array([[1.5], None, []], pa.list_(pa.float64())),
        }
    )
    metadata = {"target_sequence": SHORT, "assay": "x"}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "in/ours.parquet")
    write_model(folder / "a/m", 1)
    write_model(folder / "b/m", 2)
    return folder


def score(folder):
    return job_in_process(
        *("score_variants.py", "--model", "a/m", "--model", "b/m", "--method", *METHODS),
        *("--offset", OFFSET, "--long", "window", "--precision", "fp32"),
        *("--input", "in/", "--fasta", "p.fasta", "--output", "out", "--workers", 1),
        cwd=folder,
    )


def expected(folder, protein, variants):
    """[n][6]: the engine's scores, columns as the job's; 0 for the wild type, "", and None."""
    found = np.zeros((len(variants), 6))
    kept = [index for index, variant in enumerate(variants) if variant]
    for place, (name, method) in enumerate((n, m) for n in "ab" for m in METHODS):
        engine = Engine.load(folder / name / "m", dtype="fp32")
        some = [variants[index] for index in kept]
        found[kept, place] = engine.score_variants(protein, some, method, "window")
    return found


COLUMNS = [f"raptide_{name}_m_{method}" for name in "ab" for method in METHODS]


def split_scores(given, scored, delimiter):
    """Scores [rows][6] of a CSV table; all its other bytes must be those of the table given."""
    rows, texts = [], io.BytesIO(given)
    header = read_header(texts, "given", "mutant")
    lines = [header.row, *read_rows(texts, "given", header, header.line)]
    for row in lines:
        assert scored.startswith(row.text), row
        scored = scored[len(row.text) :]
        padding = delimiter * (len(header.columns) - len(row.cells))
        assert scored.startswith(padding.encode()), row
        scores, end, scored = scored[len(padding) :].partition(row.end or b"\0")
        assert end == row.end
        assert scores.startswith(delimiter.encode())
        rows.append(scores.decode()[1:].split(delimiter))
    assert scored == b""
    assert rows.pop(0) == COLUMNS
    return rows


def test_tables_come_back_with_every_byte_and_the_engines_scores(scored):
    done = score(scored)
    assert done.returncode == 3, done.stderr
    assert "7 records rejected" in done.stdout
    assert "variants/s" in done.stdout
    tables = scored / "out/tables"
    files = sorted(str(p.relative_to(tables)) for p in tables.rglob("*.*"))
    assert files == ["gym/gym.csv", "named.tsv.gz", "none.csv", "ours.parquet", "weird.csv"]

    rows = split_scores(WEIRD, (tables / "weird.csv").read_bytes(), ",")
    sound = [WEIRD_VARIANTS.get(index) for index in range(8)]
    numbers = expected(scored, SHORT, sound)
    for index, row in enumerate(rows):
        if index in WEIRD_VARIANTS:
            np.testing.assert_allclose(list(map(float, row)), numbers[index], atol=1e-6)
        else:
            assert row == [""] * 6, index
    given = (scored / "in/gym/gym.csv").read_bytes()
    rows = split_scores(given, (tables / "gym/gym.csv").read_bytes(), ",")
    np.testing.assert_allclose(np.array(rows, float), expected(scored, LONG, GYM), atol=1e-6)
    assert (tables / "none.csv").read_bytes() == b"sequence;mutant;" + ";".join(COLUMNS).encode()

    given, there = ((f / "named.tsv.gz").read_bytes() for f in (scored / "in", tables))
    rows = split_scores(gzip.decompress(given), gzip.decompress(there), "\t")
    numbers = expected(scored, SHORT, ["K2A", "K2C"])
    np.testing.assert_allclose(np.array([rows[0], rows[3]], float), numbers, atol=1e-6)
    assert rows[1] == rows[2] == [""] * 6

    given, table = (pq.read_table(f / "ours.parquet") for f in (scored / "in", tables))
    assert table.select(given.column_names).equals(given)
    assert table.column_names == [*given.column_names, *COLUMNS]
    assert table.schema.metadata == given.schema.metadata
    numbers = expected(scored, SHORT, ["Y5F", ""])
    there = [[table[name][row].as_py() for name in COLUMNS] for row in range(3)]
    np.testing.assert_allclose(there[:2], numbers, atol=1e-6)
    assert there[2] == [None] * 6

    rejects = pq.read_table(scored / "out/rejects.parquet").to_pylist()
    found = [(os.path.basename(r["file"]), r["line"], r["reason"].split(":")[0]) for r in rejects]
    assert found == [
        ("named.tsv.gz", 3, "unknown id"),
        ("named.tsv.gz", 4, "unknown id"),
        ("ours.parquet", 3, "misfit"),
        ("weird.csv", 7, "misfit"),
        ("weird.csv", 8, "bad letters"),
        ("weird.csv", 9, "empty"),
        ("weird.csv", 10, "misshapen"),
    ]


def test_a_job_given_again_makes_what_is_missing_and_else_nothing(scored):
    out = scored / "out"

    def state():
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.*") if p.is_file()}

    whole = state()
    parts = sorted((out / "parts").iterdir())
    parts[0].unlink()  # one without rejects
    (out / "tables/weird.csv").unlink()
    done = score(scored)
    assert done.returncode == 3, done.stderr
    assert state() == whole
    (out / "tables/ours.parquet").unlink()
    done = score(scored)
    assert "Nothing was left to compute" in done.stdout
    assert state() == whole


# What is refused before anything starts.


@pytest.mark.parametrize(
    ("tables", "arguments", "message"),
    [
        ({"a.csv": "mutant,x,sequence,x\n"}, [], "has a column 'x', twice"),
        (
            {"a.csv": "mutant,raptide_m_wt-marginals,sequence\n"},
            [],
            "has a column 'raptide_m_wt-marginals', which is to be added",
        ),
        ({"a.csv": "mutation,sequence\n"}, [], "a.csv has no column 'mutant'"),
        ({"a.csv": "mutant,seq\n"}, [], "has no column sequence or mutated_sequence among"),
        ({"a.csv": ""}, [], "a.csv is empty"),
        ({"a.csv": "mutant,id\n"}, ["--fasta", "-"], "- can be read only once"),
        ({"a.csv": "mutant,sequence\n"}, ["--model", "./m"], "names one model twice"),
        ({"a/a.csv": "mutant,sequence\n", "a.csv": "mutant,sequence\n"}, [], "rename one"),
        ({"a.txt": "mutant,sequence\n"}, ["--input", "none*.csv"], "none*.csv is not there"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tables, arguments, message, tmp_path):
    for name, text in tables.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    inputs = arguments if "--input" in arguments else ["--input", *tables, *arguments]
    done = job_in_process(
        *("score_variants.py", "--model", "m", "--output", "out", *inputs), cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# What a work computes, and at what price.


def test_what_variants_share_is_computed_once(model):
    items = [f"{SHORT} {v}" for v in ("K2A", "Q9E", "K2C:Q9E", "", "K2D")] + ["MKLV K2A"]
    proteins, variants = zip(*map(read_item, items), strict=True)
    lengths = list(map(len, proteins))

    def tokens(*methods):
        found = work_of(model, methods).tokens_beside(proteins, lengths, variants)
        return [int(cost / (length + 2)) for cost, length in zip(found, lengths, strict=True)]

    assert tokens("wt-marginals") == [1, 0, 0, 0, 0, 1]
    assert tokens("masked-marginals") == [1, 1, 0, 0, 0, 1]
    assert tokens("pseudo-ppl") == [44, 22, 22, 0, 22, 8]
    assert tokens(*METHODS) == [46, 23, 22, 0, 22, 10]

    passes = []

    class Counting:
        max_residues = 62

        def masked_log_p(self, pieces):
            passes.extend(pieces)
            return [np.zeros((len(where), 33), np.float32) for _, where in pieces]

    groups = {SHORT: ["K2A", "Q9E", "K2C:Q9E", "K2D"], "MKLV": ["K2A"]}
    assert set(_masked_marginals(Counting())(groups).values()) == {0.0}
    assert passes == [(SHORT, [1, 8]), ("MKLV", [1])]


def test_slices_keep_proteins_and_positions_together(model):
    work = work_of(model, ("masked-marginals",))
    protein = LONG[:60]
    items = [f"{protein} {protein[p]}{p + 1}{new}" for new in "AC" for p in range(60)]
    items += [f"MKLV {each}" for each in ("V4A", "K2A", "")]
    found = list(work.slices(items, 620))
    assert sorted(index for each in found for index in each) == list(range(len(items)))
    assert found[0] == [index for p in range(10) for index in (p, 60 + p)]
    assert [index for each in found for index in each][-3:] == [122, 121, 120]
    assert all(len(each) in (20, 21) for each in found[:-1])
    assert list(slices(work, items)) == [[index for each in found for index in each]]
    assert list(work.slices([], 620)) == []


class Mortal:
    """An engine that dies of one variant, without a process of its own."""

    opening_s = 0.0

    def __init__(self, work, limits):
        self._compute = work.open(1)

    def compute(self, items):
        if any("K2W" in item for item in items):
            raise Death("killed its process: SIGSEGV")
        return self._compute(items)

    def close(self):
        pass


def test_a_row_that_kills_the_engine_keeps_its_place(model, tmp_path):
    (tmp_path / "a.csv").write_text(
        "mutant,sequence\n" + "".join(f"{m},{SHORT}\n" for m in ("K2A", "K2W", "K2C"))
    )
    work = work_of(model)
    (table,) = find_tables([tmp_path / "a.csv"], work.names)
    survey = table.survey(0, work)
    output = OutputFolder.at(tmp_path / "out")
    with mock.patch.object(worker, "EngineProcess", Mortal):
        place = UnitWorker(work, output, "stamp", Limits(1, 4 << 30, 60.0))
        for packed in read_units([table], survey.units):
            list(place(packed))
    scores = Engine.load(model, dtype="fp32").score_variants(SHORT, ["K2A", "K2C"])
    with output.open_part(survey.units[0].name) as part:
        assert part.schema_arrow.names == ["row", "end", *work.names]
        column = part.read()["raptide_wt-marginals"].to_pylist()
    assert column == [pytest.approx(scores[0]), None, pytest.approx(scores[1])]
    output.write_manifest({"fingerprint": {}})
    assert output.gather_rejects() == 1
    (reject,) = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert (reject["line"], reject["id"]) == (3, "K2W")
    assert reject["reason"].startswith("killed its process")


# Rows as they stand, and units of them.

cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


@given(st.lists(st.tuples(cells, cells), max_size=20), st.sampled_from(",\t;"), st.data())
def test_units_of_a_table_hold_its_rows_byte_for_byte(model, rows, delimiter, data):
    text = io.StringIO()
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    table = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=quoting)
    table.writerows([("mutant", "sequence"), *rows])
    whole = text.getvalue().encode()
    whole = whole[:-1] if data.draw(st.booleans()) else whole
    work = work_of(model)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(units, "MOST_RECORDS", data.draw(st.integers(1, 5))),
    ):
        path = Path(folder) / "t.csv"
        path.write_bytes(data.draw(st.sampled_from([bytes, gzip.compress]))(whole))
        (table,) = find_tables([path], work.names)
        survey = table.survey(0, work)
        assert survey.records == len(rows)
        assert all(unit.records <= units.MOST_RECORDS for unit in survey.units)
        orders = st.permutations(survey.units) if not table.compression else st.just(survey.units)
        found = {}
        for unit in data.draw(orders):
            (found[unit.first],) = table.read([unit])
        for records, again in zip(
            [found[unit.first] for unit in survey.units], table.read(survey.units), strict=True
        ):
            assert records == again
        records = [found[unit.first] for unit in survey.units]
    assert [name for each in records for name in each.ids] == [mutant for mutant, _ in rows]
    header = table.header.row
    kept = [row["row"] + row["end"] for each in records for row in each.kept.to_pylist()]
    assert header.text + header.end + b"".join(kept) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'mutant,sequence\nK2A,"MK\nWT,MK\n', "a.csv:2 cannot be read as a table"),
        (b'mutant,sequence\nK2A,MK\nK2A,"MK"L\n', "a.csv:3 cannot be read as a table"),
        (b"mutant,sequence\rK2A,MK\r", "cannot be read as a table"),
    ],
)
def test_a_file_that_is_no_table_is_named_with_its_line(model, tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text)
    work = work_of(model)
    with pytest.raises(InputError, match=message):
        find_tables([tmp_path / "a.csv"], work.names)[0].survey(0, work)


def test_positions_count_from_an_offset():
    residues = encode_residues(SHORT)
    changes = parse_variant("q19e:K12A", residues, OFFSET)
    assert spell_variant(changes) == "K2A:Q9E"
    assert parse_variant("K2A", residues) == parse_variant("K0A", residues, -2)
    with pytest.raises(SequenceError, match=r"position 10 is outside .* numbered 11 to 32"):
        parse_variant("K10A", residues, OFFSET)
    with pytest.raises(SequenceError, match=r"expects Y at position 12, .* counted from 11"):
        parse_variant("Y12A", residues, OFFSET)
    with pytest.raises(SequenceError, match="changes position 12 twice"):
        parse_variant("K12A:K12C", residues, OFFSET)
