import numpy as np
import pytest
import torch
from draws import generator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from raptide.evaluation.probes import (
    APART_EACH,
    MOST_TOUCHING,
    POOL_ROWS,
    Pairs,
    PairSource,
    Scale,
    Source,
    _batches,
    draw_pairs,
    fit_pair_probe,
    fit_probe,
)


def source_of(features, classes, size=100):
    """Rows as items of so many each."""
    starts = range(0, len(classes), size)

    def get(item):
        rows = slice(starts[item], starts[item] + size)
        return features[rows], classes[rows]

    return Source(range(len(starts)), int((classes >= 0).sum()), get)


def linear_world(rows, width=8, num_classes=4, together=0.0):
    """Features, classes drawn from a softmax of them, and the true probabilities."""
    rng = generator()
    hidden = rng.normal(size=(rows, width))
    logits = hidden @ rng.normal(size=(width, num_classes)) * 0.7
    classes = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
    mixing = np.eye(width) + together * np.linspace(0.5, 1.5, width)[:, None]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return (hidden @ mixing * 7 + 3).astype(np.float32), classes, probabilities


def loss_of(probabilities, classes):
    return float(-np.log(probabilities[np.arange(len(classes)), classes]).mean())


@pytest.mark.parametrize("together", [0.0, 3.0])
def test_a_linear_probe_finds_what_sklearn_finds(together):
    features, classes, true = linear_world(12_000, together=together)
    train, valid, test = slice(0, 8000), slice(8000, 9000), slice(9000, 12_000)
    probe = fit_probe(
        source_of(features[train], classes[train]), source_of(features[valid], classes[valid]), 4
    )
    theirs = LogisticRegression(C=1e3, max_iter=2000).fit(
        (features[train] - features.mean(0)) / features.std(0), classes[train]
    )
    expected = theirs.predict_proba((features[test] - features.mean(0)) / features.std(0))
    found = probe.probabilities(features[test])
    assert found.sum(-1) == pytest.approx(1, abs=1e-5)
    assert loss_of(found, classes[test]) == pytest.approx(
        loss_of(expected, classes[test]), abs=0.01
    )
    assert np.abs(found - expected).mean() < 0.02
    assert loss_of(found, classes[test]) < loss_of(true[test], classes[test]) + 0.02
    valid_loss = log_loss(classes[valid], probe.probabilities(features[valid]))
    assert probe.loss == pytest.approx(valid_loss, abs=1e-4)


def test_a_hidden_layer_finds_what_no_line_divides():
    features = generator().normal(size=(6000, 5)).astype(np.float32)
    classes = (features[:, 0] * features[:, 1] > 0).astype(np.int64)
    parts = [source_of(features[rows], classes[rows]) for rows in (slice(5000), slice(5000, 5500))]
    test = features[5500:], classes[5500:]
    shares = [
        (fit_probe(*parts, 2, hidden=hidden).probabilities(test[0]).argmax(-1) == test[1]).mean()
        for hidden in (0, 64)
    ]
    assert shares[0] < 0.6
    assert shares[1] > 0.93


def test_the_same_features_give_the_same_probe_on_any_number_of_threads():
    features, classes, _ = linear_world(1000, width=40)
    train, valid = source_of(features, classes), source_of(features[:500], classes[:500])
    before, found = torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        np.random.seed(threads)
        for hidden in (0, 16):
            found.append(fit_probe(train, valid, 4, hidden=hidden).probabilities(features))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])


def test_rows_that_do_not_count_change_nothing():
    features, classes, _ = linear_world(2000)
    counts = np.repeat(generator().random(20) < 0.7, 100)  # whole items, so that the order stays
    some = np.where(counts, classes, -1)
    junk = np.where(counts[:, None], features, np.float32(1e6))
    valid = source_of(features[:300], classes[:300])
    one = fit_probe(source_of(junk, some), valid, 4)
    other = fit_probe(source_of(features, some), valid, 4)
    assert np.array_equal(one.probabilities(features), other.probabilities(features))


def test_with_no_validation_rows_the_last_pass_is_taken():
    features, classes, _ = linear_world(2000)
    none = source_of(features[:0], classes[:0])
    probe = fit_probe(source_of(features, classes), none, 4)
    assert np.isnan(probe.loss)
    assert (probe.probabilities(features).argmax(-1) == classes).mean() > 0.6


def test_noise_is_not_learned_by_heart():
    features = generator().normal(size=(400, 100)).astype(np.float32)
    classes = generator().choice(3, 400, p=[0.6, 0.2, 0.2])
    rows = slice(0, 300), slice(300, 400)
    probe = fit_probe(*(source_of(features[part], classes[part]) for part in rows), 3)
    assert probe.loss < 1.2  # log 3 is 1.10; learned by heart it is above 2


def test_scales_are_numpys():
    far = generator().normal(size=(5000, 6)) * [1, 5, 1e-3, 0, 1, 1] + [0, 1e3, 1, 4, 0, 0]
    far[:, 5] = 2 * far[:, 4]
    features = far.astype(np.float32)
    scale = Scale.of(np.split(features, 50))
    assert scale.mean == pytest.approx(features.mean(0, dtype=np.float64), rel=1e-4, abs=1e-4)
    spread = features.std(0, dtype=np.float64)
    assert scale.spread[[0, 1, 2, 4]] == pytest.approx(spread[[0, 1, 2, 4]], rel=1e-4)
    assert scale.spread[3] == 1
    white = scale.apply(features) @ scale.whitening
    assert np.cov(white[:, [0, 1, 2]].T) == pytest.approx(np.eye(3), abs=0.01)
    assert np.abs(white).max() < 10  # what is constant, or goes together wholly, does not blow up


def test_rows_come_once_a_pass_in_pools():
    size = POOL_ROWS // 4
    features = np.arange(10 * size, dtype=np.float32)[:, None]
    held = []

    def get(item):
        held.append(item)
        rows = slice(item * size, (item + 1) * size)
        return features[rows], np.zeros(size, np.int64)

    plain = Scale(np.zeros(1, np.float32), np.ones(1, np.float32), np.eye(1, dtype=np.float32))
    passes = []
    for turn in (0, 1):
        held.clear()
        batches = _batches(Source(range(10), 10 * size, get), plain, 1000, turn)
        first = next(batches)[0]
        assert len(held) == 4
        rows = np.concatenate([first, *(batch for batch, _ in batches)])[:, 0]
        assert np.array_equal(np.sort(rows), features[:, 0])
        passes.append(rows)
    assert not np.array_equal(*passes)


def pair_world(proteins, length=40, width=16):
    """Vectors whose products along a few directions tell which pairs touch."""
    rng = generator()
    weights = np.zeros(width)
    weights[:4] = [2.0, -2.0, 2.0, 1.0]

    def make():
        vectors = rng.normal(size=(length, width)).astype(np.float32)
        i, j = np.triu_indices(length, 6)
        logits = (vectors[i] * vectors[j]) @ weights + vectors[i, 5] + vectors[j, 5] - 3
        touching = (rng.random(len(i)) < 1 / (1 + np.exp(-logits))).astype(np.int64)
        return vectors * 3 + 1, Pairs(i, j, touching), logits

    return [make() for _ in range(proteins)]


def test_a_pair_probe_finds_products_and_sums():
    world = pair_world(60)

    def source(items):
        return PairSource(items, lambda item: world[item][0], lambda item: world[item][1])

    probe = fit_pair_probe(source(range(45)), source(range(45, 50)))
    areas = []
    for vectors, pairs, logits in world[50:]:
        scores = probe.scores(vectors)
        assert scores.dtype == np.float32
        assert np.array_equal(scores, scores.T)
        found = scores[pairs.i, pairs.j]
        assert np.corrcoef(found, logits)[0, 1] > 0.98
        areas.append([roc_auc_score(pairs.touching, found), roc_auc_score(pairs.touching, logits)])
    assert np.mean(areas, axis=0)[0] == pytest.approx(np.mean(areas, axis=0)[1], abs=0.01)


def test_pairs_are_drawn_alike_each_time_and_keep_their_answers():
    i, j = np.triu_indices(100, 6)
    touching = (generator().random(len(i)) < 0.1).astype(np.int64)
    all_pairs = Pairs(i, j, touching)
    drawn, again, other = (draw_pairs(all_pairs, seed) for seed in (2**63, 2**63, 3))
    assert np.array_equal(drawn.i, again.i)
    assert not np.array_equal(drawn.i, other.i)
    assert drawn.touching.sum() == MOST_TOUCHING
    assert len(drawn.touching) == MOST_TOUCHING * (1 + APART_EACH)
    answers = dict(zip(zip(i, j, strict=True), touching, strict=True))
    for one, two, answer in zip(drawn.i, drawn.j, drawn.touching, strict=True):
        assert answers.pop((one, two)) == answer  # each once
    few = draw_pairs(Pairs(i, j, np.zeros(len(i), np.int64)), 1)
    assert len(few.touching) == APART_EACH
