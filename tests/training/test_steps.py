"""One update, without Ray and DeepSpeed around it."""

import math

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from raptide.alphabet import ESM_33
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.errors import TrainingDiverged
from raptide.model.config import ModelSettings
from raptide.model.transformer import Esm
from raptide.training import step
from raptide.training.batches import cut_share, share_bounds
from raptide.training.step import Stepper, _as_divergence

pytestmark = pytest.mark.usefixtures("alone")


class PlainEngine:
    """What train_step asks of a DeepSpeed engine, done by torch; some passes can give NaN."""

    def __init__(self, accumulation, poisoned=(), clip=1e9):
        settings = ModelSettings(layers=1, width=32, heads=2)
        self.module = Esm(settings).initialise(3)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0)
        self.device = torch.device("cpu")
        self._accumulation, self._poisoned, self._clip = accumulation, poisoned, clip
        self._passes = self._steps = 0

    def __call__(self, packed, targets):
        losses = self.module(packed, targets)
        if packed.tokens_T.numel() > 2:
            self._passes += 1
            if self._passes - 1 in self._poisoned:
                return losses * float("nan")
        return losses

    def backward(self, loss):
        (loss / self._accumulation).backward()

    def step(self):
        self._steps += 1
        if self._steps % self._accumulation == 0:
            self.found = [p.grad.clone() for p in self.module.parameters()]
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
            self.gradients = [p.grad.clone() for p in self.module.parameters()]
            self.optimizer.step()
            self.optimizer.zero_grad()


def a_batch(rows):
    rng = np.random.default_rng(4)
    tokens = rng.integers(4, 24, (rows, 40)).astype(np.uint8)
    targets = np.where(rng.random(tokens.shape) < 0.2, tokens, ESM_33.pad).astype(np.uint8)
    segments = [np.array([40], np.int32)] * rows
    return GlobalBatch(PackedRows(tokens, targets, segments), np.zeros((rows, 3)), Cursor())


def run(batch, poisoned=()):
    bounds = share_bounds(len(batch.rows.tokens), 0, 1, 1, len(batch.rows.tokens))
    engine = PlainEngine(len(bounds), poisoned)
    share = cut_share(bounds, ESM_33, engine.device, batch)
    return Stepper(engine, 1).step(share, 0.1), engine


def targets_of(batch, row):
    return int((batch.rows.targets[row] != ESM_33.pad).sum())


def test_a_pass_that_is_no_number_is_left_out_of_the_update_and_counted():
    batch = a_batch(4)
    clean, _ = run(batch)
    result, engine = run(batch, poisoned=(2,))
    assert result.left_out == targets_of(batch, 2)
    assert math.isfinite(result.loss)
    assert clean.left_out == 0
    assert all(parameter.isfinite().all() for parameter in engine.module.parameters())
    others = PackedRows(
        np.delete(batch.rows.tokens, 2, 0),
        np.delete(batch.rows.targets, 2, 0),
        batch.rows.segments[:3],
    )
    without, reference = run(GlobalBatch(others, batch.row_ids[:3], Cursor()))
    assert result.loss == pytest.approx(without.loss)
    without_targets = sum(targets_of(batch, row) for row in (0, 1, 3))
    share = without_targets / batch.num_targets
    for found, expected in zip(engine.gradients, reference.gradients, strict=True):
        torch.testing.assert_close(found, expected * share)


def test_an_update_of_nothing_but_nan_changes_no_weight():
    result, engine = run(a_batch(2), poisoned=(0, 1))
    assert math.isnan(result.loss)
    assert all((gradient == 0).all() for gradient in engine.gradients)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_under_a_finite_loss_spoils_no_weight(wrong):
    """One value in one pass; clipping would spread it over all."""
    batch = a_batch(3)
    bounds = share_bounds(3, 0, 1, 1, 3)
    engine = PlainEngine(3, clip=1.0)
    engine.optimizer = torch.optim.AdamW(engine.module.parameters(), lr=1e-3)
    share = cut_share(bounds, ESM_33, engine.device, batch)
    stepper = Stepper(engine, 1)
    clean = stepper.step(share, 1e-3)
    expected = torch.stack([gradient.norm() for gradient in engine.found]).norm()
    assert clean.grad_norm == pytest.approx(expected.item(), rel=1e-5)
    assert not clean.skipped

    def spoil(gradient):
        spoiled = gradient.clone()
        spoiled[0] = wrong
        return spoiled

    handle = engine.module.layers[0].fc1.bias.register_hook(spoil)
    result = stepper.step(share, 1e-3)
    assert math.isfinite(result.loss)
    assert result.left_out == 0
    assert result.skipped
    assert all(parameter.isfinite().all() for parameter in engine.module.parameters())
    handle.remove()
    assert not stepper.step(share, 1e-3).skipped


def test_the_end_of_all_scales_of_an_fp16_loss_is_told_as_what_it_is():
    """DeepSpeed's own error has no type, and looks like one that may pass."""
    deepspeed.init_distributed(dist_init_required=False)
    scaler = DynamicLossScaler(
        4.0, scale_window=1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False
    )
    scaler.update_scale(True)
    scaler.update_scale(True)
    with pytest.raises(TrainingDiverged, match="at every scale"), _as_divergence():
        scaler.update_scale(True)
    with pytest.raises(KeyError), _as_divergence():
        {}["of another kind"]


@pytest.mark.parametrize("rows", [1, 4])
def test_ranks_meet_once_a_step_however_many_passes_it_has(rows, monkeypatch):
    met = []
    monkeypatch.setattr(step.dist, "all_reduce", lambda tensor, *_: met.append(tensor.numel()))
    batch = a_batch(rows)
    bounds = share_bounds(rows, 0, 1, 1, rows)
    engine = PlainEngine(len(bounds))
    share = cut_share(bounds, ESM_33, engine.device, batch)
    Stepper(engine, 2).step(share, 0.1, look=True)
    assert met == [3 + 4]
