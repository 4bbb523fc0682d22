"""What a measure's uncertainty comes from."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Sample(Protocol):
    """What was found of each unit, and the statistic that is made of all."""

    @property
    def units(self) -> int:
        """That are drawn from: proteins, queries, positions, assays."""

    def value(self) -> float:
        """The statistic."""

    def replicates(self, counts: np.ndarray) -> np.ndarray:
        """The statistic of drawn units, [b] float64.

        Args:
            counts: how often each unit was drawn, [b, units] (any integer type).
        """

    def arrays(self) -> dict[str, Any]:
        """All of it, to be kept: `kind`, and numbers, strings or numpy arrays by name."""
