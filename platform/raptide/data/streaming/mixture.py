"""Several corpora in one stream, by weight.

Places of the stream come in rounds of ROUND. How many of a round belong to each corpus follows from
the weights, and they lie as evenly spread as they can, so that any stretch of the stream holds the
corpora in their shares. Within its places each corpus runs through its own epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raptide.errors import ConfigError

ROUND = 1024


@dataclass(frozen=True)
class Place:
    """A block's turn: one corpus's epoch, and the position in its order there."""

    source: int
    epoch: int
    position: int


@dataclass(frozen=True)
class Mixture:
    """Which corpus each place of a stream belongs to; a single corpus is a round of its blocks."""

    sizes: tuple[int, ...]
    """Blocks of each corpus."""

    quotas: tuple[int, ...]
    """Places of each corpus in a round."""

    sources: np.ndarray
    """The corpus of each place in a round, [epoch_places] int."""

    turns: np.ndarray
    """Which of its corpus's places in the round each is, [epoch_places] int."""

    @classmethod
    def of(cls, sizes: list[int], residues: list[float], weights: list[float]) -> Mixture:
        """
        Args:
            sizes: blocks of each corpus.
            residues: residues that a block of each gives out.
            weights: shares of residues asked for; only their ratios count.

        Raises:
            ConfigError: a share is too small for a place in each round.
        """
        quotas = [sizes[0]] if len(sizes) == 1 else _quotas(residues, weights)
        sources = np.repeat(np.arange(len(quotas)), quotas)
        turns = np.concatenate([np.arange(quota) for quota in quotas])
        order = np.lexsort((sources, (turns + 0.5) / np.array(quotas)[sources]))
        return cls(tuple(sizes), tuple(quotas), sources[order], turns[order])

    @property
    def epoch_places(self) -> int:
        """Places in a round; of a single corpus, in an epoch."""
        return sum(self.quotas)

    def locate(self, place: int) -> Place:
        """Whose turn a place of the stream is."""
        number, offset = divmod(place, self.epoch_places)
        source = int(self.sources[offset])
        turn = number * self.quotas[source] + int(self.turns[offset])
        return Place(source, *divmod(turn, self.sizes[source]))

    def mean(self, values: list[float]) -> float:
        """A value of each corpus, averaged over the places."""
        return float(np.dot(values, self.quotas) / self.epoch_places)


def _quotas(residues: list[float], weights: list[float]) -> list[int]:
    """Places in a round, by the largest remainders."""
    shares = np.array(weights) / np.array(residues)
    exact = shares / shares.sum() * ROUND
    quotas = np.floor(exact).astype(int)
    for source in np.argsort(-(exact - quotas), kind="stable")[: ROUND - quotas.sum()]:
        quotas[source] += 1
    if not quotas.all():
        raise ConfigError(
            f"corpus: the weights {weights} leave number {int(np.argmin(quotas)) + 1} without a "
            f"place among {ROUND} blocks; raise its weight, or leave it out."
        )
    return quotas.tolist()
