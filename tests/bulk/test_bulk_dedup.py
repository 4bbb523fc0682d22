"""Equal sequences of all inputs, computed once."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from bulk_works import SEGV, ManyUnits, check_sum
from draws import generator, random_sequence
from test_bulk_job import assert_tidy, parts_of, run, values_of, write_fasta

from raptide.bulk import EmbedWork
from raptide.bulk.work import Model
from raptide.errors import ConfigError
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm

pytestmark = pytest.mark.usefixtures("cluster")


def repeated(different, count):
    return [different[int(index)] for index in generator().integers(0, len(different), count)]


def test_each_sequence_is_computed_once_and_its_copies_have_its_numbers(tmp_path):
    different = [random_sequence(int(generator().integers(1, 40))) for _ in range(30)]
    first = write_fasta(tmp_path / "a.fasta", repeated(different, 60), "a{}")
    second = write_fasta(tmp_path / "b.fasta", [*repeated(different, 40), "M1"], "b{}")
    sequences = [line for file in (first, second) for line in file.read_text().split()[1::2]][:-1]
    work = ManyUnits(str(tmp_path / "log"))
    outcome = run(work, [first, second], tmp_path / "out", dedup=True)
    assert sorted(work.computed()) == sorted(set(sequences))
    names = [f"a{n}" for n in range(60)] + [f"b{n}" for n in range(40)]
    assert values_of(tmp_path / "out") == (names, list(map(check_sum, sequences)))
    assert (outcome.rows, outcome.rejects) == (100, 1)
    assert_tidy(tmp_path / "out")

    whole = parts_of(tmp_path / "out")
    for name in list(whole)[3:7]:
        (tmp_path / "out/parts" / name).unlink()
    run(work, [first, second], tmp_path / "out", dedup=True)
    assert parts_of(tmp_path / "out") == whole
    with pytest.raises(ConfigError, match="dedup: true there, false here"):
        run(work, [first, second], tmp_path / "out")


def test_copies_of_a_deadly_record_are_rejected_with_it(tmp_path):
    sequences = [random_sequence(int(generator().integers(9, 30))) for _ in range(30)]
    for place in (4, 12, 27):
        sequences[place] = f"M{SEGV}"
    file = write_fasta(tmp_path / "a.fasta", sequences)
    outcome = run(ManyUnits(str(tmp_path / "log")), [file], tmp_path / "out", dedup=True)
    assert (outcome.rows, outcome.rejects) == (27, 3)
    names, values = values_of(tmp_path / "out")
    kept = [n for n in range(30) if n not in (4, 12, 27)]
    assert names == [f"p{n}" for n in kept]
    assert values == [check_sum(sequences[n]) for n in kept]
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [each["line"] for each in rejects] == [9, 25, 55]
    assert rejects[0]["reason"] == "killed its process: SIGSEGV"
    assert {each["reason"] for each in rejects[1:]} == {
        "killed its process: as a record with the same sequence did"
    }


def test_embeddings_of_residues_are_filled_in_too(tmp_path):
    shape = ModelSettings(layers=1, width=16, heads=2)
    write_weights(tmp_path / "m", Weights.of(Esm(shape).initialise(1)))
    different = [random_sequence(200) for _ in range(20)]
    file = write_fasta(tmp_path / "a.fasta", repeated(different, 150))
    work = EmbedWork(Model.find(tmp_path / "m"), "fp32", "reject", "residue", (-1, 0))
    tables = []
    for dedup in (False, True):
        run(work, [file], tmp_path / str(dedup), dedup=dedup, memory_gb=2.0, workers=1)
        tables.append(pq.read_table(tmp_path / str(dedup) / "parts"))
    assert tables[0].schema.equals(tables[1].schema)
    assert (
        tables[0]
        .select(["id", "sequence_sha256", "length"])
        .equals(tables[1].select(["id", "sequence_sha256", "length"]))
    )
    for name in ("embedding_-1", "embedding_0"):
        plain, filled = (np.array(table[name].to_pylist()) for table in tables)
        assert plain.shape == (150, 200, 16)
        np.testing.assert_allclose(filled, plain, atol=1e-6)
