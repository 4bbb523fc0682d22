"""A step as a GPU runs it, on tensors that have shapes and types and no values.

Whoever asks for a value, or for a size that depends on one, fails there: that is what makes a host
wait for its GPU. Tensors say that they are the CPU's, since a build without CUDA knows no others.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from raptide.alphabet import ALPHABETS
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.model import transformer
from raptide.model.config import ModelSettings
from raptide.model.transformer import Esm
from raptide.training.batches import cut_share
from raptide.training.step import Stepper

LAYERS, HEADS, WIDTH = 3, 4, 64
FORWARD, BACKWARD = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"


class Calls(TorchDispatchMode):
    """Counts operators, and keeps what attention is given."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.given = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().split(".")[0]] += 1
        if func.name().split(".")[0] == FORWARD:
            self.given.append(args)
        return func(*args, **(kwargs or {}))


class BareEngine:
    """What a Stepper asks of DeepSpeed."""

    def __init__(self, model):
        self.module, self.device = model, torch.device("cpu")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass


def a_batch(alphabet):
    """Four rows of 40 tokens, two sequences each."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(4, 24, (4, 40)).astype(np.uint8)
    targets = np.where(rng.random(tokens.shape) < 0.2, tokens, alphabet.pad).astype(np.uint8)
    segments = [np.array([25, 15], np.int32)] * 4
    return GlobalBatch(PackedRows(tokens, targets, segments), np.zeros((4, 3)), Cursor())


@pytest.fixture(params=["esm1", "esm1b", "esm2"])
def traced(request, monkeypatch):
    """Two micro-batches of two rows: the operators, and what the step comes to."""
    monkeypatch.setattr(transformer, "has_varlen_attention", lambda *_: True)
    settings = ModelSettings(family=request.param, layers=LAYERS, width=WIDTH, heads=HEADS)
    alphabet = ALPHABETS[settings.alphabet.name]
    batch = a_batch(alphabet)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        torch.set_default_dtype(torch.bfloat16)  # a fake model cannot be cast
        try:
            model = Esm(settings)
        finally:
            torch.set_default_dtype(torch.float32)
        share = cut_share([(0, 2), (2, 4)], alphabet, torch.device("cpu"), batch)
        stepper = Stepper(BareEngine(model), 1)
        with Calls() as calls:
            total = stepper.launch(share, 0.1, (False, True, False, False))
    return calls, total, model, fake, request.param


def test_attention_is_one_call_a_layer_in_half_precision_over_int32_boundaries(traced):
    calls, _, _, _, family = traced
    assert calls.counts[FORWARD] == calls.counts[BACKWARD] == 2 * LAYERS
    extra = 4 if family == "esm1" else 0
    for query, key, value, cu_q, cu_k, longest_q, longest_k, *_ in calls.given:
        assert query.shape == (80, HEADS, WIDTH // HEADS)
        assert key.shape == value.shape == (80 + extra, HEADS, WIDTH // HEADS)
        assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        assert cu_q.shape == cu_k.shape == (5,)
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (longest_q, longest_k) == (25, 25 + (extra > 0))


def test_a_step_asks_for_no_value_on_its_way(traced):
    """Else `traced` would have failed; what came of the step has still to be read."""
    calls, total, model, fake, _ = traced
    assert (total.shape, total.dtype) == ((7,), torch.float64)
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.dtype == torch.bfloat16
    asking = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
    assert not asking & set(calls.counts)
    with fake:
        with pytest.raises(DataDependentOutputException):
            total.tolist()
        with pytest.raises(DynamicOutputShapeException):
            torch.nonzero(total)
