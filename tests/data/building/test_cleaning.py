import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raptide.alphabet import decode_residues, encode_residues
from raptide.config import parse_settings
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.cleaning import REASONS, CleaningSettings, reasons_by_content
from raptide.errors import ConfigError, CorpusError

LETTERS = "LAGVSERTIDPKQNFYMHWC"


@given(
    st.lists(st.text("MKLX", min_size=1, max_size=30), min_size=1, max_size=20),
    st.integers(1, 10),
    st.integers(10, 30),
    st.floats(0, 1),
)
def test_reasons_are_those_of_each_record_alone(sequences, shortest, longest, unknown):
    settings = CleaningSettings(
        min_residues=shortest, max_residues=longest, max_unknown_fraction=unknown
    )
    residues = np.concatenate([encode_residues(s) for s in sequences])
    lengths = np.array([len(s) for s in sequences])
    for sequence, reason in zip(
        sequences, reasons_by_content(residues, lengths, settings), strict=True
    ):
        if len(sequence) < shortest:
            assert REASONS[reason] == "too_short"
        elif len(sequence) > longest:
            assert REASONS[reason] == "too_long"
        elif sequence.count("X") > unknown * len(sequence):
            assert REASONS[reason] == "too_many_unknown"
        else:
            assert REASONS[reason] == ""


def test_a_longest_below_the_shortest_is_refused():
    tree = {"cleaning": {"min_residues": 10, "max_residues": 9}}
    with pytest.raises(ConfigError, match=r"max_residues \(9\) must be at least min_residues"):
        parse_settings(BuildSettings, tree, source="command line")


def protein(rng, length=None):
    return "".join(rng.choices(LETTERS, k=length or rng.randint(30, 90)))


@pytest.fixture(scope="module")
def text():
    """200 clusters; some sequences occur in several of them, some are short, long or unknown."""
    rng = random.Random(4)
    shared = [protein(rng) for _ in range(10)]
    records = []
    for cluster in range(200):
        own = [protein(rng) for _ in range(rng.choice([1, 1, 3]))]
        if cluster % 5 == 0:
            own.append(rng.choice(shared))
        if cluster % 20 == 1:
            own += [own[0], protein(rng, 5), protein(rng, 200), "X" * 40]
        for member, letters in enumerate(own):
            records.append(f">c{cluster}m{member} cluster50=c{cluster}m0\n{letters}\n")
    return records


def build(records, folder, *, listed=(), fraction=0.3, **cleaning):
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.fasta").write_text("".join(records[number::2]))
    settings = BuildSettings(
        block_residues=2048,
        cluster_tag="cluster50",
        holdout_fraction=fraction,
        cleaning=CleaningSettings(**cleaning),
    )
    inputs = [folder / "0.fasta", folder / "1.fasta"]
    return build_corpus(inputs, folder / "corpus", settings, heldout_clusters=listed)


def sequences(corpus, split):
    """(cluster, letters) of every member."""
    found = []
    for shard in corpus.manifest["shards"]:
        if shard["split"] == split:
            for row in pq.read_table(corpus.path / shard["name"]).to_pylist():
                for member in row["members"]:
                    letters = decode_residues(np.frombuffer(member, np.uint8))
                    found.append((row["cluster"], letters))
    return found


def assert_accounted_for(corpus, text):
    counts = corpus.manifest["counts"]
    kept = sum(counts[split].get("sequences", 0) for split in ("train", "heldout"))
    assert corpus.manifest["read"] == len(text)
    assert kept + sum(corpus.manifest["dropped"].values()) == len(text)


@pytest.mark.usefixtures("cluster")
def test_no_training_sequence_equals_a_held_out_one(text, tmp_path):
    corpus = build(text, tmp_path / "a")
    train, heldout = (sequences(corpus, split) for split in ("train", "heldout"))
    assert not {letters for _, letters in train} & {letters for _, letters in heldout}
    assert len(train) > len({letters for _, letters in train}), "other copies stay"
    assert corpus.manifest["dropped"].keys() == {"also_heldout"}
    assert_accounted_for(corpus, text)


@pytest.mark.usefixtures("cluster")
def test_every_rule_counts_what_it_drops_in_any_order_of_the_input(text, tmp_path):
    rules = {
        "min_residues": 10,
        "max_residues": 150,
        "max_unknown_fraction": 0.5,
        "drop_duplicates": True,
    }
    corpus = build(text, tmp_path / "a", **rules)
    dropped = corpus.manifest["dropped"]
    assert dropped["too_short"] == dropped["too_long"] == dropped["too_many_unknown"] == 10
    assert dropped["duplicate"] >= 10
    everything = sequences(corpus, "train") + sequences(corpus, "heldout")
    assert len(everything) == len({letters for _, letters in everything})
    assert_accounted_for(corpus, text)
    shuffled = random.Random(5).sample(text, len(text))
    again = build(shuffled, tmp_path / "b", **rules)
    assert again.digest == corpus.digest
    assert again.manifest["dropped"] == dropped


@pytest.mark.usefixtures("cluster")
def test_listed_clusters_are_held_out_whole(text, tmp_path):
    listed = ["c7m0", "c21m0", "not-there"]
    corpus = build(text, tmp_path / "a", fraction=0.0, listed=listed)
    assert {cluster for cluster, _ in sequences(corpus, "heldout")} == {"c7m0", "c21m0"}
    assert not {cluster for cluster, _ in sequences(corpus, "train")} & set(listed)
    assert corpus.manifest["listed_heldout_clusters"] == 3


@pytest.mark.usefixtures("cluster")
def test_rules_that_leave_nothing_are_refused(text, tmp_path):
    with pytest.raises(CorpusError, match=r"All \d+ records were dropped \(too_short: \d+\)"):
        build(text, tmp_path / "a", min_residues=1000)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0.fasta", "1.fasta"]
