"""Hit-10 and AUC against scikit-learn and a slow loop; blocks, controls and chance."""

import tracemalloc
from math import comb

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from raptide.evaluation.metrics import homology
from raptide.evaluation.metrics.homology import chance, control, cosines, level_of, search

NUMBER = 160


@pytest.fixture
def groups():
    """Names of folds and superfamilies, and who takes part."""
    generator = np.random.default_rng(1)
    folds = generator.integers(0, 14, NUMBER)
    superfamilies = [f"{fold}.{generator.integers(0, 3)}" for fold in folds]
    return [str(fold) for fold in folds], superfamilies, generator.random(NUMBER) > 0.1


def slow(similarities, outer, inner, kept, query):
    """Hit-10 and AUC of one query, by the words of the definition; None if it is none."""
    ranked = [
        j for j in range(len(outer)) if kept[j] and inner[j] != inner[query]
    ]  # the query shares its own inner group
    positive = [outer[j] == outer[query] for j in ranked]
    if not kept[query] or not any(positive):
        return None
    scores = [similarities[query, j] for j in ranked]
    # Worst first among equals, as ties are broken against positives.
    order = sorted(range(len(ranked)), key=lambda i: (-scores[i], positive[i]))
    hit = any(positive[i] and scores[i] > -np.inf for i in order[:10])
    finite = [max(score, -1e9) for score in scores]
    return float(hit), roc_auc_score(positive, finite)


def compare_with_slow(similarities, outer, inner, kept):
    blocks = [(i, similarities[i : i + 50]) for i in range(0, len(outer), 50)]
    level = level_of(outer, inner, kept)
    [found], _, _ = search(blocks, [level], len(outer))
    expected = [slow(similarities, outer, inner, kept, query) for query in range(len(outer))]
    assert [each is not None for each in expected] == list(level.queries)
    hits, areas = np.array([each for each in expected if each is not None]).T
    assert 0 < hits.mean() < 1
    np.testing.assert_allclose(found.hits, hits, atol=1e-9)
    np.testing.assert_allclose(found.areas, areas, atol=1e-9)


def test_random_vectors_are_judged_as_by_hand(groups):
    outer, inner, kept = groups
    vectors = np.random.default_rng(2).normal(size=(NUMBER, 6))
    vectors[:, 0] += np.array(outer, float) % 5
    blocks = cosines(lambda i: vectors[i], NUMBER)
    similarities = np.concatenate([block for _, block in blocks])
    np.testing.assert_allclose(similarities, cosine_similarity(vectors), atol=1e-12)
    compare_with_slow(similarities, outer, inner, kept)


def test_ties_count_half_in_auc_and_against_in_hits(groups):
    outer, inner, kept = groups
    coarse = np.random.default_rng(3).integers(0, 12, (NUMBER, NUMBER)).astype(np.float32)
    compare_with_slow(coarse, outer, inner, kept)


def test_what_is_not_similar_at_all_is_never_a_hit(groups):
    outer, inner, kept = groups
    generator = np.random.default_rng(4)
    scores = generator.normal(size=(NUMBER, NUMBER)).astype(np.float32)
    scores[generator.random(scores.shape) < 0.97] = -np.inf
    compare_with_slow(scores, outer, inner, kept)


def test_numbers_that_are_none_are_as_similar_as_nothing():
    level = level_of(["a"] * 3 + ["b"] * 3, list("pqrxyz"))
    [found], _, real = search([(0, np.full((6, 6), np.nan))], [level], 6)
    assert not found.hits.any()
    assert (found.areas == 0.5).all()
    assert not real.any()


def test_a_ranking_of_positives_alone_has_no_auc():
    level = level_of(["a"] * 3, list("pqr"))
    [found], _, _ = search([(0, np.eye(3))], [level], 3)
    assert (found.hits == 1).all()
    assert np.isnan(found.areas).all()


@pytest.mark.parametrize("width", [3, 40])
def test_cosines_are_the_same_in_blocks_of_any_size(width, monkeypatch):
    vectors = np.random.default_rng(5).normal(size=(101, width)).astype(np.float32)
    vectors[7] = 0
    whole = cosine_similarity(vectors.astype(np.float64))
    for vectors_bytes, similarities_bytes in [(1, 1), (8 * width * 13, 8 * 101 * 40), (1e9, 8e3)]:
        monkeypatch.setattr(homology, "VECTORS_BYTES", int(vectors_bytes))
        monkeypatch.setattr(homology, "SIMILARITIES_BYTES", int(similarities_bytes))
        parts = list(cosines(lambda i: vectors[i], 101))
        assert [first for first, _ in parts] == list(
            np.cumsum([0] + [len(block) for _, block in parts[:-1]])
        )
        np.testing.assert_allclose(np.concatenate([b for _, b in parts]), whole, atol=1e-12)


def test_memory_does_not_grow_with_the_vectors(monkeypatch):
    monkeypatch.setattr(homology, "VECTORS_BYTES", 1 << 20)
    monkeypatch.setattr(homology, "SIMILARITIES_BYTES", 1 << 20)
    vector = np.arange(8000, dtype=np.float32)
    tracemalloc.start()
    number = sum(len(block) for _, block in cosines(lambda i: np.roll(vector, i), 200))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 200
    assert peak < 6 << 20  # all of them are 12.8 MB


def test_neighbours_are_the_most_similar_but_the_query(monkeypatch):
    monkeypatch.setattr(homology, "NEIGHBOURS", 5)
    scores = np.random.default_rng(6).normal(size=(30, 30))
    scores[3, :27] = -np.inf
    _, near, real = search([(0, scores)], [level_of(["a"] * 30, list(map(str, range(30))))], 30)
    for query in range(30):
        order = [j for j in np.argsort(-scores[query], kind="stable") if j != query]
        found = real[query].sum()
        assert list(near[query][:found]) == order[:found]
        assert query not in near[query]
    assert real[3].sum() == 3
    assert real[4].all()


def test_shuffled_labels_come_out_at_chance(groups):
    outer, inner, kept = groups
    level = level_of(outer, inner, kept)
    vectors = np.random.default_rng(7).normal(size=(NUMBER, 5))
    vectors += 2 * np.eye(14)[np.array(outer, int)] @ np.random.default_rng(8).normal(size=(14, 5))
    [found], near, real = search(cosines(lambda i: vectors[i], NUMBER), [level], NUMBER)
    shuffled = control(near, real, level, 200, seed=1)
    error = shuffled.std() / len(shuffled) ** 0.5
    assert shuffled.mean() == pytest.approx(chance(level), abs=4 * error)
    assert error < 0.005
    assert found.hits.mean() > chance(level) + 0.1
    assert (shuffled == control(near, real, level, 200, seed=1)).all()


def test_a_control_whose_labels_stay_is_the_measure_itself(groups, monkeypatch):
    outer, inner, kept = groups
    level = level_of(outer, inner, kept)
    scores = np.random.default_rng(9).normal(size=(NUMBER, NUMBER))
    [found], near, real = search([(0, scores)], [level], NUMBER)
    monkeypatch.setattr(homology.np, "argsort", lambda bits, kind: np.arange(len(bits)))
    assert control(near, real, level, 1, seed=1) == pytest.approx([found.hits.mean()])


def test_chance_follows_from_the_sizes_of_groups():
    outer = ["a"] * 6 + ["b"] * 5 + ["c"] * 9
    inner = ["a1"] * 2 + ["a2"] * 4 + ["b1"] * 5 + ["c1"] * 8 + ["c2"]
    # Of a1: 4 positives and 14 others; of a2: 2 and 14; of c1: 1 and 11; of c2: 8 and 11.
    missed = [comb(14, 10) / comb(18, 10)] * 2 + [comb(14, 10) / comb(16, 10)] * 4
    missed += [comb(11, 10) / comb(12, 10)] * 8 + [comb(11, 10) / comb(19, 10)]
    assert chance(level_of(outer, inner)) == pytest.approx(1 - np.mean(missed), abs=1e-12)
