"""The branch that GPUs take, one kernel over all sequences, run here with a kernel for CPUs."""

import itertools
from functools import partial

import pytest
import torch
import varlen_on_cpu  # noqa: F401  the kernel
from draws import pack, random_tokens
from torch._dynamo.testing import CompileCounterWithBackend

from raptide.model import transformer
from raptide.model.attention import attend, attend_at_once, with_extra
from raptide.model.config import ModelSettings
from raptide.model.packed import Packed, Targets
from raptide.model.transformer import Esm

# Dynamo looks at layers' inputs in a way that torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

FAMILIES = ("esm1", "esm1b", "esm2")

LENGTHS = ((3, 64, 5), (40,), (128, 3, 3, 77, 19), (7, 7))


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(transformer, "has_varlen_attention", lambda *_: True)


def model_of(family, layers=3):
    model = Esm(ModelSettings(family=family, layers=layers, width=32, heads=4)).initialise(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that differences show
    return model


def gradients_of(model, packed):
    at = torch.arange(len(packed.tokens_T))[::3]
    model.zero_grad()
    losses = model(packed, Targets(at, packed.tokens_T[at]))
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_kernel_over_all_sequences_gives_what_one_by_one_gives(family, monkeypatch):
    model = model_of(family)
    for lengths in LENGTHS:
        packed = pack(random_tokens(model.settings.alphabet, lengths))
        expected = gradients_of(model, packed)
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "has_varlen_attention", lambda *_: True)
            patch.setattr(transformer, "attend", None)
            found = gradients_of(model, packed)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (5, 1, 30, 2), (4,) * 9])
def test_the_extra_key_stands_behind_every_sequence_and_learns_as_in_the_loop(lengths):
    """Queries, keys, values and what ESM-1 has learned; their gradients too."""
    inputs = [torch.randn(sum(lengths), 2, 8) for _ in range(3)]
    inputs += [torch.randn(2, 8), torch.randn(2, 8)]
    for each in inputs:
        each.requires_grad_()
    q, k, v, *extra = inputs
    packed = Packed(torch.zeros(sum(lengths), dtype=torch.long), lengths)
    weight = torch.randn(sum(lengths), 2, 8)
    spans = packed.spans_with_extra
    found = attend_at_once(q, k, v, spans, tuple(extra))
    expected = attend(q, k, v, lengths, tuple(extra))
    torch.testing.assert_close(found, expected)
    for mine, reference in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)
    keys = with_extra(k, extra[0], spans).split([n + 1 for n in lengths])
    for piece, own in zip(keys, k.split(list(lengths)), strict=True):
        torch.testing.assert_close(piece, torch.cat([own, extra[0][None]]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
def test_whole_layers_are_compiled_once_for_all_lengths_and_layers(
    family, trains, at_once, monkeypatch
):
    """More layers than Dynamo would compile again before it gives up."""
    layers = torch._dynamo.config.recompile_limit + 2
    model = model_of(family, layers)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))

    def answer(packed):
        if trains:
            return gradients_of(model, packed)
        with torch.inference_mode():
            return model(packed)

    batches = [pack(random_tokens(model.settings.alphabet, lengths)) for lengths in LENGTHS]
    expected = list(map(answer, batches))
    model.compile_layers()
    for packed, reference in zip(batches, expected, strict=True):
        torch.testing.assert_close(answer(packed), reference, atol=1e-3, rtol=1e-3)
    # One that Dynamo gave up while it was making it is empty.
    assert len([graph for graph in counter.graphs if len(graph.graph.nodes)]) == 1


def test_activations_are_computed_again_through_a_compiled_layer(at_once, monkeypatch):
    model = model_of("esm1", layers=2)
    packed = pack(random_tokens(model.settings.alphabet))
    expected = gradients_of(model, packed)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model.compile_layers()
    model.checkpoint_activations = True
    torch.testing.assert_close(gradients_of(model, packed), expected, atol=1e-3, rtol=1e-3)


def test_the_kernel_is_called_once_a_layer(at_once, monkeypatch):
    calls = itertools.count()
    inner = torch.nn.attention.varlen.varlen_attn

    def counted(*args):
        next(calls)
        return inner(*args)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", counted)
    model = model_of("esm1", layers=5)
    model(pack(random_tokens(model.settings.alphabet)))
    assert next(calls) == 5
