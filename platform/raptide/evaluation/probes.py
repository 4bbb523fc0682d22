"""Probes: what can be read off frozen features by a linear map or a small network.

A linear probe is multinomial logistic regression; a two-layer probe has one hidden layer; a pair
probe is logistic regression on the products and sums of two residues' vectors. All are trained by
Adam on standardised features, in random order, at a rate that falls to nothing; what is kept is the
state of the pass over the data after which the loss on the validation share was least.

Features are taken item by item (a protein at a time) and never all held: memory is a pool of
`POOL_ROWS` rows, whatever there is to learn from. The same features give the same probe to the last
digit: draws are seeded, and one thread computes.

Letters of shapes: N rows, D features, K classes, L residues, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

POOL_ROWS = 16_384
"""Rows that are held and mixed at once; more only where one item has more."""

LEAST_BATCH, MOST_BATCH = 128, 1024
"""Rows of a batch: a small part of all, within these."""
BATCHES = 32
"""In a pass, at least, unless batches would be too small."""
STEPS = 1000
"""Updates at least, unless that takes more than `MOST_TURNS` passes over the data."""
LEAST_TURNS, MOST_TURNS = 2, 60
PATIENCE = 5
"""Passes without a lower validation loss after which training ends."""

RATE = 1e-2
HIDDEN = 64
"""Width of the hidden layer."""

SCALE_ROWS, SCALE_ROWS_EACH = 20_000, 20
"""Rows by which features are standardised: so many, or so many for each feature."""
LEAST_SPREAD = 1e-6
"""Standard deviation below which a feature counts as constant."""
LEAST_VARIANCE = 1e-4
"""Added to the variances of standardised features along their axes, which are 1 on average."""

MOST_TOUCHING = 64
"""Touching pairs of one protein that are learned from."""
APART_EACH = 4
"""Pairs apart for each of them."""


@dataclass(frozen=True)
class Source:
    """Items to learn from."""

    items: Sequence[int]
    rows: int
    """That count, in all of them."""
    get: Callable[[int], tuple[np.ndarray, np.ndarray]]
    """An item's features [N, D] fp32 and classes [N] int64, below 0 where a row does not count."""

    def counted(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows that count, item by item in random order."""
        for place in rng.permutation(len(self.items)):
            features, classes = self.get(self.items[place])
            counts = classes >= 0
            yield (features, classes) if counts.all() else (features[counts], classes[counts])


@dataclass(frozen=True)
class Scale:
    """Where features lie, how far they spread, and how they go together."""

    mean: np.ndarray
    """[D] fp32."""
    spread: np.ndarray
    """Standard deviation, [D] fp32; 1 of a constant feature."""
    whitening: np.ndarray
    """Inverse square root of the correlations, [D, D] fp32, symmetric."""

    @classmethod
    def of(cls, arrays: Iterable[np.ndarray]) -> Scale:
        """Of the first rows of arrays [N, D]: `SCALE_ROWS`, or `SCALE_ROWS_EACH` a feature."""
        rows, origin = 0, np.zeros(())
        total, squares = np.zeros(()), np.zeros(())
        for features in filter(len, arrays):
            if not rows:  # near the mean, so that the difference of squares keeps its digits
                origin = features.mean(0, dtype=np.float64)
            centred = torch.from_numpy(features - origin)
            rows += len(features)
            total = total + centred.sum(0).numpy()
            squares = squares + (centred.T @ centred).numpy()
            if rows >= max(SCALE_ROWS, SCALE_ROWS_EACH * features.shape[1]):
                break
        mean = total / rows
        covariance = squares / rows - np.outer(mean, mean)
        spread = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        spread[spread < LEAST_SPREAD] = 1.0
        values, axes = torch.linalg.eigh(torch.from_numpy(covariance / np.outer(spread, spread)))
        whitening = (axes * (values.clamp(min=0) + LEAST_VARIANCE) ** -0.5) @ axes.T
        return cls(
            (origin + mean).astype(np.float32),
            spread.astype(np.float32),
            whitening.float().numpy(),
        )

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Standardised."""
        return (features - self.mean) / self.spread


@dataclass(frozen=True)
class Probe:
    """A trained probe."""

    scale: Scale
    module: _Network
    loss: float
    """Mean negative log likelihood of the validation rows, nats."""

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Of each class, [N, K] fp32."""
        with torch.inference_mode(), one_thread():
            scores = self.module(torch.from_numpy(self.scale.apply(features)))
            return scores.softmax(-1).numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread: sums do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_probe(
    train: Source,
    valid: Source,
    num_classes: int,
    *,
    hidden: int = 0,
    scale: Scale | None = None,
) -> Probe:
    """Train a linear probe, or one with a hidden layer.

    Args:
        train: at least one row that counts.
        valid: what the best pass is chosen on; of no rows the last one is taken.
        hidden: width of the hidden layer; 0 for none.
        scale: `scale_of(train)`, where it is known from another probe.
    """
    with one_thread():
        scale = scale or scale_of(train)
        module = _Network(scale.whitening, num_classes, hidden)
        batch = min(max(train.rows // BATCHES, LEAST_BATCH), MOST_BATCH)
        turns = min(max(-(-STEPS * batch // train.rows), LEAST_TURNS), MOST_TURNS)
        steps = turns * -(-train.rows // batch)
        optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
        best, kept, since, step = float("inf"), _state(module), 0, 0
        for turn in range(turns):
            for features, classes in _batches(train, scale, batch, turn):
                optimizer.param_groups[0]["lr"] = RATE * max(1 - step / steps, 0.0)
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(features), classes).backward()
                optimizer.step()
                step += 1
            loss = _mean_loss(module, valid, scale)
            if not loss >= best:  # so that NaN, which no rows have, passes
                best, kept, since = loss, _state(module), 0
            elif (since := since + 1) == PATIENCE:
                break
        module.load_state_dict(kept)
    return Probe(scale, module, best)


def scale_of(source: Source) -> Scale:
    """Of the rows of a source that count, or as many as it takes."""
    return Scale.of(features for features, _ in source.counted(np.random.default_rng(0)))


class _Network(nn.Module):
    """Standardised features to scores: linear from 0, or one hidden layer from a fixed seed.

    Its first weights are learned in coordinates in which features are uncorrelated: where they go
    together, as those of language models do, Adam is far from the optimum for long. Not the
    features are turned but the weights, which are fewer.
    """

    def __init__(self, whitening: np.ndarray, num_classes: int, hidden: int) -> None:
        super().__init__()
        width = len(whitening)
        self.register_buffer("whitening", torch.from_numpy(whitening), persistent=False)
        first = torch.zeros(hidden or num_classes, width)
        self.bias = nn.Parameter(torch.zeros(len(first)))
        self.last: nn.Linear | None = None
        if hidden:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                first.normal_(std=width**-0.5)
                self.last = nn.Linear(hidden, num_classes)
        self.first = nn.Parameter(first)

    @property
    def weight(self) -> torch.Tensor:
        """For standardised features, [hidden or K, D]."""
        return self.first @ self.get_buffer("whitening")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.linear(features, self.weight, self.bias)
        return scores if self.last is None else self.last(scores.relu())


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _batches(
    source: Source, scale: Scale, batch: int, turn: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All rows once: items in random order, rows mixed within a pool of items."""
    rng = np.random.default_rng([0, turn])
    pool: list[tuple[np.ndarray, np.ndarray]] = []
    held = 0
    for rows in source.counted(rng):
        pool.append(rows)
        held += len(rows[1])
        if held >= POOL_ROWS:
            yield from _mixed(pool, scale, batch, rng)
            pool, held = [], 0
    if held:
        yield from _mixed(pool, scale, batch, rng)


def _mixed(
    pool: list[tuple[np.ndarray, np.ndarray]], scale: Scale, batch: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    features = torch.from_numpy(scale.apply(np.concatenate([each for each, _ in pool])))
    classes = torch.from_numpy(np.concatenate([each for _, each in pool]))
    order = torch.from_numpy(rng.permutation(len(classes)))
    for rows in order.tensor_split(-(-len(order) // batch)):
        yield features[rows], classes[rows]


def _mean_loss(module: nn.Module, source: Source, scale: Scale) -> float:
    """NaN of no rows."""
    total, rows = 0.0, 0
    with torch.inference_mode():
        for features, classes in source.counted(np.random.default_rng(0)):
            scores = module(torch.from_numpy(scale.apply(features)))
            answers = torch.from_numpy(classes)
            total += float(nn.functional.cross_entropy(scores, answers, reduction="sum"))
            rows += len(classes)
    return total / rows if rows else float("nan")


@dataclass(frozen=True)
class Pairs:
    """Pairs of residues of one protein; arrays of [P]."""

    i: np.ndarray
    j: np.ndarray
    touching: np.ndarray
    """1 or 0, int64."""


@dataclass(frozen=True)
class PairSource:
    """Proteins to learn from."""

    items: Sequence[int]
    vectors: Callable[[int], np.ndarray]
    """Of a protein's residues, [L, D] fp32."""
    pairs: Callable[[int], Pairs]
    """Of its residues."""


@dataclass(frozen=True)
class PairProbe:
    """Log odds that two residues touch: linear in the products and sums of their vectors."""

    scale: Scale
    product: np.ndarray
    """[D] fp32."""
    sum: np.ndarray
    """[D] fp32."""
    loss: float
    """Mean negative log likelihood of the validation pairs, nats."""

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """Log odds up to a constant, symmetric [L, L] fp32, from vectors [L, D]."""
        with one_thread():
            scaled = torch.from_numpy(self.scale.apply(vectors))
            product, total = torch.from_numpy(self.product), torch.from_numpy(self.sum)
            alone = scaled @ total
            both = (scaled * product) @ scaled.T
            return ((both + both.T) / 2 + (alone[:, None] + alone[None])).numpy()


def draw_pairs(pairs: Pairs, seed: int) -> Pairs:
    """Some of a protein's pairs: at most `MOST_TOUCHING`, and `APART_EACH` times as many apart.

    Args:
        seed: the same pairs are drawn by the same; a hash of the sequence.
    """
    rng = np.random.default_rng(seed)
    touching, apart = np.flatnonzero(pairs.touching == 1), np.flatnonzero(pairs.touching == 0)
    if len(touching) > MOST_TOUCHING:
        touching = rng.choice(touching, MOST_TOUCHING, replace=False)
    most_apart = APART_EACH * max(len(touching), 1)
    if len(apart) > most_apart:
        apart = rng.choice(apart, most_apart, replace=False)
    drawn = np.sort(np.concatenate([touching, apart]))
    return Pairs(pairs.i[drawn], pairs.j[drawn], pairs.touching[drawn])


def fit_pair_probe(train: PairSource, valid: PairSource, scale: Scale | None = None) -> PairProbe:
    """Train a pair probe on all pairs that the sources give.

    Args:
        scale: of the training proteins' vectors, where it is known from another probe.
    """
    rng = np.random.default_rng(0)
    places = rng.permutation(len(train.items))
    with one_thread():
        scale = scale or Scale.of(train.vectors(train.items[place]) for place in places)
    probe = fit_probe(_features(train, scale), _features(valid, scale), 2)
    weight = probe.module.weight.detach().numpy()
    product, total = np.split((weight[1] - weight[0]) / probe.scale.spread, 2)
    return PairProbe(scale, product, total, probe.loss)


def _features(source: PairSource, scale: Scale) -> Source:
    def get(item: int) -> tuple[np.ndarray, np.ndarray]:
        scaled = scale.apply(source.vectors(item))
        pairs = source.pairs(item)
        one, other = scaled[pairs.i], scaled[pairs.j]
        return np.concatenate([one * other, one + other], axis=1), pairs.touching

    rows = sum(len(source.pairs(item).touching) for item in source.items)
    return Source(source.items, rows, get)
