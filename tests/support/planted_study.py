"""Points of a study that never ran, with what is known of them."""

import numpy as np

from raptide.evaluation.cache import Measured
from raptide.evaluation.results import Measure
from raptide.evaluation.samples import Ratio
from raptide.scaling.measuring import Point

PROTEINS, RESIDUES = 300, 50


def a_point(
    nats, parameters, data="d", seed=1, kind="transformer", hardness=None, flops=None, tokens=1e6
):
    """A model whose mean nats are exactly so many, some proteins being harder than others."""
    if hardness is None:
        hardness = np.ones(PROTEINS)
    sums = nats * RESIDUES * hardness / hardness.mean()
    measure = Measure("ece-masked", "x", Ratio(sums, np.full(PROTEINS, float(RESIDUES)), exp=True))
    facts = {
        "kind": kind,
        "model": f"m{parameters:.0f}",
        "data": data,
        "seed": seed,
        "parameters": parameters,
        "epoch_tokens": tokens,
        "flops": flops or parameters * 6e6,
    }
    measured = Measured(measure, float(np.exp(nats)), 0.0, 0.0)
    return Point(facts, ece=measured, ece_masked=measured)
