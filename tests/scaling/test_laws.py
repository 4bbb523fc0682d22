"""Power laws: a planted one is found again, and its interval knows proteins and seeds."""

import numpy as np
import pytest
from draws import generator
from planted_study import PROTEINS, a_point

from raptide.scaling.laws import Curves, best_by_compute, cells, fit, laws, seed_deviation

SIZES = (2e5, 6e5, 1.5e6, 4e6)


def planted(scale=4.0, exponent=0.05, **options):
    return [a_point(scale * x**-exponent, x, **options) for x in SIZES]


def test_a_planted_law_is_found_again():
    law = fit(cells(planted()), "parameters", 0.0)
    assert (law.exponent, law.scale) == (pytest.approx(0.05), pytest.approx(4.0))
    assert law.ece(1e6) == pytest.approx(np.exp(4.0 * 1e6**-0.05))
    assert law.low == pytest.approx(0.05)  # equal proteins: nothing is uncertain
    assert law.high == pytest.approx(0.05)


def test_proteins_that_are_hard_for_all_leave_the_exponent_certain():
    """The draws are the same for all models, so that what they share cancels."""
    hardness = generator().lognormal(sigma=0.5, size=PROTEINS)
    shared = fit(cells(planted(hardness=hardness)), "parameters", 0.0)
    assert shared.high - shared.low < 1e-9
    own = [
        a_point(4.0 * x**-0.05, x, hardness=generator().lognormal(sigma=0.5, size=PROTEINS))
        for x in SIZES
    ]
    each = fit(cells(own), "parameters", 0.0)
    assert each.high - each.low > 0.01
    assert each.low < 0.05 < each.high


def test_what_seeds_do_widens_the_interval():
    found = cells([*planted(), a_point(4.0 * SIZES[0] ** -0.05 + 0.04, SIZES[0], seed=2)])
    deviation = seed_deviation(found)
    assert deviation == pytest.approx(0.04 / np.sqrt(2) / 0.7979, rel=1e-3)
    narrow, wide = (fit(found, "parameters", each) for each in (0.0, deviation))
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)
    assert seed_deviation(cells(planted())) == 0.0


def test_a_law_has_a_band_around_it_that_is_narrowest_amid_its_points():
    noise = generator()
    points = [
        a_point(4.0 * x**-0.05, x, hardness=noise.lognormal(sigma=0.5, size=PROTEINS))
        for x in SIZES
    ]
    law = fit(cells(points), "parameters", 0.0)
    widths = []
    for x in (1e3, 9e5, 1e9):
        low, high = law.ece_interval(x)
        assert low < law.ece(x) < high
        widths.append(np.log(high) - np.log(low))
    assert widths[1] == min(widths)
    for cell in cells(points):
        low, high = cell.ece_interval
        assert low < np.exp(cell.nats) < high


@pytest.mark.parametrize(
    ("gain", "seeds", "told"),
    [
        (0.05, 0.0, "beyond what proteins and seeds do"),
        (-0.05, 0.0, "beyond what proteins and seeds do"),
        (0.0, 0.0, "which may be none"),
        (0.05, 0.04, "which may be none"),
    ],
)
def test_whether_the_largest_gains_on_the_smallest_is_said(gain, seeds, told):
    hardness = generator().lognormal(sigma=0.5, size=PROTEINS)
    points = [a_point(2.8, 2e5, hardness=hardness), a_point(2.9, 6e5, hardness=hardness)]
    points += [a_point(2.8 - gain, 1.5e6, hardness=hardness)]
    if seeds:
        points.append(a_point(2.9 + seeds, 6e5, seed=2, hardness=hardness))
    (trend,) = Curves.through(points).trends
    assert (trend.first, trend.last) == ("m200000", "m1500000")
    assert told in trend.sentence()
    ends = f"{np.exp(2.8):.2f} to {np.exp(2.8 - gain):.2f}"
    assert f"parameters, d: from m200000 to m1500000 the ECE goes from {ends}" in trend.sentence()


def test_seeds_of_one_model_are_one_point():
    points = [a_point(2.0, 1e6, seed=1), a_point(2.2, 1e6, seed=2), a_point(1.0, 1e6, "other")]
    first, other = cells(points)
    assert first.nats == pytest.approx(2.1)
    assert first.seeds == (pytest.approx(2.0), pytest.approx(2.2))
    assert (other.data, other.seeds) == ("other", (pytest.approx(1.0),))


def test_fewer_than_three_sizes_have_no_law():
    assert fit(cells(planted()[:2]), "parameters", 0.0) is None
    same_size = [a_point(2.0, 1e6, data=name) for name in "abcd"]
    assert fit(cells(same_size), "parameters", 0.0) is None
    unknown = planted()
    for point in unknown:
        point.facts["epoch_tokens"] = None
    assert fit(cells(unknown), "epoch_tokens", 0.0) is None


def test_the_best_by_compute_are_those_that_nobody_beats_more_cheaply():
    points = [
        a_point(2.5, 1e5, flops=1.0),
        a_point(2.6, 2e5, flops=2.0),
        a_point(2.4, 3e5, flops=3.0),
        a_point(2.4, 4e5, flops=4.0),
    ]
    assert [each.nats for each in best_by_compute(cells(points))] == pytest.approx([2.5, 2.4])


def test_laws_are_of_transformers_alone_by_data_model_and_compute():
    lstm = planted(exponent=0.2, kind="lstm", data="l")
    found = cells([*planted(), *planted(data="e", exponent=0.03), *lstm])
    fitted = laws(found, 0.0)
    assert fitted["parameters d"].exponent == pytest.approx(0.05)
    assert fitted["parameters e"].exponent == pytest.approx(0.03)
    assert fitted["compute"].exponent == pytest.approx(0.05)
    assert fitted.keys() == {"parameters d", "parameters e", "compute"}  # one size has one data
