"""What people read: parts in every tool, HDF5, CSV, and the lineage in W&B."""

import hashlib
import json

import duckdb
import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from draws import generator, random_sequence, random_weights
from in_process import job_in_process
from offline_wandb import read_runs

from raptide import Engine
from raptide.model.formats.detect import write_weights

NAMES = [
    *("NA", "nan", "null", "None", "", "007", "1e5", "True", "2024-01-01", "twice", "twice"),
    *("a/b/../c", "sp|P1|X_Y", "it's", 'say "no"', "back\\slash", "comma,semi;tab\tline\nend"),
    *("=1+1", "é\u2028ü 蛋白", " blank ", "x" * 100_000),
]


COLUMNS = ["id", "sequence_sha256", "length", "embedding", "h5_key"]


@pytest.fixture(scope="module")
def made(cluster, tmp_path_factory):
    """Proteins with odd names, as a table, and their embeddings and scores by two jobs."""
    folder = tmp_path_factory.mktemp("odd names")
    write_weights(folder / "m", random_weights(layers=1, width=8, heads=2))
    lengths = generator().integers(1, 40, len(NAMES))
    sequences = [random_sequence(int(length)) for length in lengths]
    sequences[7] = sequences[6]
    pq.write_table(pa.table({"id": NAMES, "sequence": sequences}), folder / "in.parquet")
    common = ("--model", "m", "--input", "in.parquet", "--precision", "fp32", "--workers", "1")
    for job in (
        ("embed_proteins.py", "--output", "my embeddings", "--format", "h5", "--track"),
        ("score_proteins.py", "--output", "scores", "--format", "csv", "--track"),
    ):
        done = job_in_process(*job, *common, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert (
            f"{len(NAMES)} rows in 1 parts, of {sum(map(len, sequences))} residues" in done.stdout
        )
    return folder, sequences, Engine.load(folder / "m", dtype="fp32")


def test_names_and_numbers_are_the_same_in_every_tool(made):
    folder, sequences, engine = made
    parts = folder / "my embeddings/parts"
    expected = engine.embed(sequences)
    digests = [hashlib.sha256(each.encode()).hexdigest() for each in sequences]
    with duckdb.connect() as connection:
        duck = connection.sql(f"select * from '{parts}/*.parquet'").fetchall()
    readers = {
        "pandas": pd.read_parquet(parts).to_dict("list"),
        "polars": pl.read_parquet(parts / "*.parquet").to_dict(as_series=False),
        "polars, lazily": pl.scan_parquet(parts).collect().to_dict(as_series=False),
        "pyarrow": pyarrow.dataset.dataset(parts).to_table().to_pydict(),
        "duckdb": dict(zip(COLUMNS, zip(*duck, strict=True), strict=True)),
    }
    for tool, columns in readers.items():
        assert (
            list(columns)
            == ["id", "sequence_sha256", "length", "embedding", "h5_key"][: len(columns)]
        ), tool
        assert list(columns["id"]) == NAMES, tool
        assert list(columns["length"]) == list(map(len, sequences)), tool
        assert list(columns["sequence_sha256"]) == digests, tool
        np.testing.assert_allclose(np.stack(columns["embedding"]), expected, atol=1e-6)


def test_hdf5_is_as_biotrainer_reads_it(made):
    folder, sequences, engine = made
    with h5py.File(folder / "my embeddings/embeddings.h5") as file:
        found = {key: (each.attrs["original_id"], each[:]) for key, each in file.items()}
    assert len(found) == len(set(sequences))
    expected = engine.embed(sequences)
    for index, sequence in enumerate(sequences):
        key = hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()
        name, values = found[key]
        assert name == NAMES[sequences.index(sequence)]
        np.testing.assert_allclose(values, expected[index], atol=1e-6)


def test_csv_holds_the_names_and_scores(made):
    folder, sequences, engine = made
    table = pa.csv.read_csv(
        folder / "scores/scores.csv",
        convert_options=pa.csv.ConvertOptions(
            column_types={"id": pa.string()}, strings_can_be_null=False
        ),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
    )
    assert table["id"].to_pylist() == NAMES
    np.testing.assert_allclose(
        table["score"], engine.score_sequences(sequences, "one-pass"), atol=1e-6
    )


def test_lineage_in_wandb_leads_from_the_model_to_the_data_set(made):
    folder, _, _ = made
    embedded, scored = read_runs(folder / "wandb")
    manifest = json.loads((folder / "my embeddings/manifest.json").read_text())
    _, config, history, artifacts = embedded
    assert config["model"] == manifest["fingerprint"]["model"]
    (model, data) = artifacts
    assert model[:2] == ("model", f"model-{config['model'][:16]}")
    assert {each.rpartition("/")[0] for each in model[2]} == {(folder / "m").as_uri()}
    assert data[:2] == ("dataset", "embed-my-embeddings")
    assert data[2] == [(folder / "my embeddings/manifest.json").as_uri()]
    assert history[-1]["bulk/rows"] == len(NAMES)
    assert scored[3][1][:2] == ("dataset", "score-scores")
    assert scored[3][0][:2] == model[:2]
