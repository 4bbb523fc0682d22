"""Held-out ECE of models that have come to nothing: a number all the same."""

import json
import math

import pytest
import torch

from raptide.alphabet import ALPHABETS
from raptide.data.streaming.batch import StreamSettings
from raptide.data.streaming.stream import Source, StreamPlan
from raptide.training.planning.recipe import EvaluationSettings
from raptide.training.watching.heldout import Ece, HeldoutEvaluator, heldout_rows


@pytest.mark.parametrize("nats", [800.0, 1e6, 1e300, math.inf])
def test_a_bad_model_has_a_finite_ece_that_json_can_hold(nats):
    ece = Ece.of_sums([nats * 7, 2.0], [7, 2])
    assert ece.all_chosen > 1e300
    assert ece.masked_only == pytest.approx(math.e)
    json.dumps(ece.all_chosen, allow_nan=False)


def test_every_recipe_is_asked_for_the_same_residues(corpus):
    source = Source(str(corpus.path), corpus.digest, 1.0)
    shapes = {"row_tokens": 256, "crop_tokens": 128, "batch_rows": 4}
    found = []
    for share in (0.15, 0.25, 0.4):
        settings = StreamSettings(**shapes, mask_fraction=share)
        plan = StreamPlan(sources=(source,), settings=settings, alphabet="esm-33")
        found.append(heldout_rows(plan, EvaluationSettings(blocks=1)))
    for rows in found[1:]:
        assert (rows.tokens == found[0].tokens).all()
        assert (rows.targets == found[0].targets).all()


@pytest.mark.parametrize(("right", "wrong"), [(0.0, 1e6), (-3e38, 3e38)])
def test_logits_beyond_all_measure_are_evaluated(corpus, right, wrong):
    source = Source(str(corpus.path), corpus.digest, 1.0)
    settings = StreamSettings(row_tokens=256, crop_tokens=128, batch_rows=4)
    plan = StreamPlan(sources=(source,), settings=settings, alphabet="esm-33")
    rows = heldout_rows(plan, EvaluationSettings(blocks=1))

    class Sure(torch.nn.Module):
        """Gives every place the same wrong token, with a logit beyond all others."""

        def forward(self, packed):
            logits = torch.full((len(packed.tokens_T), len(ALPHABETS["esm-33"])), right)
            logits[:, 0] = wrong
            return logits

    found = HeldoutEvaluator(rows, plan, 4).measure(Sure(), torch.device("cpu"))
    assert found.ece.all_chosen > 1e300
    assert found.accuracy == 0
    assert all(math.isfinite(value) for value in found.metrics().values())
