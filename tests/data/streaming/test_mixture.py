"""Several corpora in one stream."""

from collections import Counter

import numpy as np
import pytest

from raptide.alphabet import FIRST_RESIDUE
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.streaming.batch import Cursor, StreamSettings
from raptide.data.streaming.mixture import Mixture
from raptide.data.streaming.stream import (
    Source,
    StreamPlan,
    describe_difference,
    global_batches,
    prepare_rows,
)
from raptide.errors import ConfigError

SETTINGS = StreamSettings(row_tokens=512, crop_tokens=256, batch_rows=16, seed=5, mask_fraction=0.1)


def test_places_follow_the_weights_everywhere_and_each_corpus_its_own_epochs():
    mixture = Mixture.of([5, 400], residues=[1000.0, 500.0], weights=[1.0, 3.0])
    assert mixture.epoch_places == 1024
    # Three quarters of the residues in blocks of half the size: six of seven places.
    places = [mixture.locate(place) for place in range(4 * 1024)]
    for stretch in (places[:50], places[700:900], places):
        share = np.mean([place.source == 1 for place in stretch])
        assert share == pytest.approx(6 / 7, abs=0.5 / len(stretch) + 0.01)
    for source, size in enumerate([5, 400]):
        visits = [(p.epoch, p.position) for p in places if p.source == source]
        assert visits == [divmod(turn, size) for turn in range(len(visits))]


def test_one_corpus_is_its_own_order():
    mixture = Mixture.of([7], residues=[1000.0], weights=[2.0])
    places = [mixture.locate(place) for place in range(15)]
    assert [(p.source, p.epoch, p.position) for p in places] == [
        (0, *divmod(n, 7)) for n in range(15)
    ]


def test_a_weight_too_small_for_a_place_is_refused():
    with pytest.raises(ConfigError, match="leave number 2 without a place"):
        Mixture.of([10, 10], residues=[1.0, 1.0], weights=[1.0, 1e-6])


@pytest.fixture(scope="module")
def pair(cluster, tmp_path_factory):
    """Plans over two corpora whose letters tell them apart, at two weightings."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(1)
    sources = []
    for letters, count in (("AGVL", 300), ("KRDE", 60)):
        fasta = folder / f"{letters}.fasta"
        fasta.write_text(
            "".join(
                f">{letters}{n}\n{''.join(rng.choice(list(letters), rng.integers(50, 200)))}\n"
                for n in range(count)
            )
        )
        settings = BuildSettings(block_residues=2048, holdout_fraction=0.1)
        corpus = build_corpus([fasta], folder / letters, settings)
        sources.append(Source(str(corpus.path), corpus.digest))
    return sources


def plan_of(pair, weight=1.0):
    first, second = pair
    return StreamPlan((first, Source(second.path, second.digest, weight)), SETTINGS, "esm-33")


def test_a_mixed_stream_gives_the_shares_of_residues_that_were_asked_for(pair):
    plan = plan_of(pair, weight=0.5)
    counts = Counter()
    for batch in global_batches(plan, Cursor(), 20):
        true = np.where(batch.rows.targets != 1, batch.rows.targets, batch.rows.tokens)
        counts.update(true.ravel().tolist())
    letters = "LAGVSERTIDPKQNFYMHWC"
    of = {letter: counts[FIRST_RESIDUE + letters.index(letter)] for letter in letters}
    first, second = (sum(of[x] for x in group) for group in ("AGVL", "KRDE"))
    assert second / (first + second) == pytest.approx(1 / 3, abs=0.03)


def test_a_mixed_stream_goes_on_at_any_cursor(pair):
    plan = plan_of(pair)
    whole = list(global_batches(plan, Cursor(), 12))
    assert whole[-1].row_ids[-1].tolist() > whole[0].row_ids[0].tolist()
    for at in (0, 4, 10):
        (again,) = global_batches(plan, whole[at].next_cursor, 1)
        np.testing.assert_array_equal(again.row_ids, whole[at + 1].row_ids)
        np.testing.assert_array_equal(again.rows.tokens, whole[at + 1].rows.tokens)


def test_sources_draw_other_random_bits_even_from_the_same_corpus(pair):
    plan = StreamPlan((pair[0], pair[0]), SETTINGS, "esm-33")
    one, other = (prepare_rows(plan, 0, place) for place in (0, 1))
    assert one.tokens.shape != other.tokens.shape or (one.tokens != other.tokens).any()


def test_weights_belong_to_the_fingerprint(pair):
    difference = describe_difference(plan_of(pair).fingerprint(), plan_of(pair, 2.0).fingerprint())
    assert difference.startswith("corpus_digest: ")
    assert "mixture" not in StreamPlan(tuple(pair[:1]), SETTINGS, "esm-33").fingerprint()
