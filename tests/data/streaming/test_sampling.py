"""UR50/S, UR50/D and UR100 out of one corpus: what three epochs show, and what they never show."""

import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare

from raptide.alphabet import ESM_33, decode_residues, decode_sequences
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.streaming.batch import Cursor, StreamSettings
from raptide.data.streaming.rows import draw_members
from raptide.data.streaming.stream import Source, StreamPlan, global_batches, prepare_rows

EPOCHS = 3


@pytest.fixture(scope="module")
def corpus(cluster, tmp_path_factory):
    """300 clusters of 1 to 40 members, no sequence twice; blocks smaller than large clusters."""
    rng = random.Random(8)
    folder = tmp_path_factory.mktemp("sampling")
    with (folder / "a.fasta").open("w") as file:
        for number in range(300):
            for member in range(rng.choice([1, 1, 1, 3, 8, 40])):
                letters = "".join(rng.choices("LAGVSERTIDPKQNFYMHWC", k=rng.randint(20, 200)))
                file.write(f">c{number}m{member} cluster50=c{number}m0\n{letters}\n")
    settings = BuildSettings(block_residues=3000, holdout_fraction=0.2, cluster_tag="cluster50")
    return build_corpus([folder / "a.fasta"], folder / "corpus", settings)


@pytest.fixture(scope="module")
def members(corpus):
    """What each sequence is: split, cluster, name, place in the cluster."""
    known = {}
    for shard in corpus.manifest["shards"]:
        for row in pq.read_table(corpus.path / shard["name"]).to_pylist():
            for index, (name, member) in enumerate(zip(row["ids"], row["members"], strict=True)):
                letters = decode_residues(np.frombuffer(member, np.uint8))
                place = row["first_member"] + index
                known[letters] = (shard["split"], row["cluster"], name, place)
    return known


def shown(corpus, sampling, fraction=1.0):
    """The sequences of each of the first epochs, as the stream packs them, masks undone."""
    settings = StreamSettings(
        sampling=sampling, fraction=fraction, row_tokens=1024, batch_rows=8, seed=3
    )
    plan = StreamPlan((Source(str(corpus.path), corpus.digest),), settings, "esm-33")
    blocks = len(plan.training_blocks(corpus))
    rows = sum(
        len(prepare_rows(plan, epoch, position).tokens)
        for epoch in range(EPOCHS)
        for position in range(blocks)
    )
    epochs = [[] for _ in range(EPOCHS + 1)]
    for batch in global_batches(plan, Cursor(), -(-rows // settings.batch_rows)):
        tokens = np.where(batch.rows.targets == ESM_33.pad, batch.rows.tokens, batch.rows.targets)
        for row, lengths, (epoch, _, _) in zip(
            tokens, batch.rows.segments, batch.row_ids, strict=True
        ):
            epochs[epoch] += decode(row, lengths)
    return epochs[:EPOCHS]


def decode(row, lengths):
    residues = row[: lengths.sum()]
    ends = np.cumsum(lengths)
    assert (residues[ends - 1] == ESM_33.eos).all(), "nothing is cropped here"
    return decode_sequences(
        residues[(residues != ESM_33.cls) & (residues != ESM_33.eos)], lengths - 2
    )


def test_three_data_sets_out_of_one_corpus_and_never_a_held_out_sequence(corpus, members):
    training = [what for what in members.values() if what[0] == "train"]
    clusters = {cluster for _, cluster, _, _ in training}
    representatives = sorted(name for _, _, name, place in training if place == 0)
    everything = sorted(name for _, _, name, _ in training)
    assert len(representatives) == len(clusters) < len(everything)
    for sampling in ("representatives", "members", "all"):
        for epoch in shown(corpus, sampling):
            seen = [members[letters] for letters in epoch]
            assert {split for split, *_ in seen} == {"train"}
            names = sorted(name for _, _, name, _ in seen)
            if sampling == "representatives":
                assert names == representatives
            elif sampling == "all":
                assert names == everything
            else:
                assert Counter(cluster for _, cluster, _, _ in seen) == Counter(clusters)


def test_epochs_of_members_differ_and_a_restart_changes_nothing(corpus, members):
    first, again = shown(corpus, "members"), shown(corpus, "members")
    assert first == again
    drawn = [sorted(epoch) for epoch in first]
    assert drawn[0] != drawn[1] != drawn[2]


def test_members_are_drawn_evenly_over_clusters_of_all_sizes(corpus):
    """Chi-square over all places of all clusters of one size, 400 epochs."""
    drawn = {}
    blocks = [corpus.read_block(block) for block in corpus.blocks("train")]
    for epoch in range(400):
        for block in blocks:
            picked = draw_members(block, "members", 1, epoch)
            row = np.searchsorted(block.member_splits, picked, side="right") - 1
            place = block.first_member[row] + picked - block.member_splits[row]
            for size, index in zip(block.cluster_size[row].tolist(), place.tolist(), strict=True):
                drawn.setdefault(size, np.zeros(size))[index] += 1
    assert set(drawn) == {1, 3, 8, 40}
    for size, counts in drawn.items():
        if size > 1:
            assert chisquare(counts).pvalue > 0.001, size


def test_subsets_nest(corpus):
    tenth, half, whole = (
        {letters for epoch in shown(corpus, "all", fraction) for letters in epoch}
        for fraction in (0.1, 0.5, 1.0)
    )
    assert tenth < half < whole
