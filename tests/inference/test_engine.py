import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EsmForMaskedLM

from raptide.alphabet import RESIDUES
from raptide.errors import ConfigError, SequenceError
from raptide.inference.batching import plan_batches
from raptide.inference.engine import Engine
from raptide.model.bundle import save_bundle
from raptide.model.config import ModelSettings
from raptide.model.transformer import Esm

LETTERS = "LAGVSERTIDPKQNFYMHWC"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = Esm(ModelSettings(layers=3, width=64, heads=4)).initialise(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that differences show
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, model.settings, model.state_dict(), {"step": 1})
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder, device="cpu", dtype="fp32", max_batch_tokens=256)


@pytest.fixture(scope="module")
def reference(folder):
    return EsmForMaskedLM.from_pretrained(folder).eval()


@pytest.fixture
def sequences():
    rng = np.random.default_rng()
    return ["".join(rng.choice(list(LETTERS), n)) for n in (30, 1, 200, 7, 400, 64)]


def tokens_of(sequence):
    return torch.tensor([[0, *(4 + RESIDUES.index(c) for c in sequence), 2]])


@torch.inference_mode()
def test_embeddings_equal_transformers(engine, reference, sequences):
    mean = engine.embed(sequences)
    bos = engine.embed(sequences, pooling="bos")
    residue = engine.embed(sequences, layers=(0, 2, -1), pooling="residue")
    assert mean.shape == bos.shape == (len(sequences), engine.width)
    for i, sequence in enumerate(sequences):
        hidden = reference(tokens_of(sequence), output_hidden_states=True).hidden_states
        last = hidden[-1][0].numpy()
        np.testing.assert_allclose(mean[i], last[1:-1].mean(0), atol=1e-4)
        np.testing.assert_allclose(bos[i], last[0], atol=1e-4)
        assert residue[i].shape == (3, len(sequence), engine.width)
        for mine, layer in zip(residue[i], (0, 2, 3), strict=True):
            np.testing.assert_allclose(mine, hidden[layer][0, 1:-1].numpy(), atol=1e-4)


@torch.inference_mode()
def test_scores_equal_transformers_with_one_residue_masked_at_a_time(engine, reference):
    sequence = "MKTWYLVAGE"
    tokens = tokens_of(sequence)
    nats = 0.0
    for position in range(1, len(sequence) + 1):
        masked = tokens.clone()
        masked[0, position] = 32
        log_p = torch.log_softmax(reference(masked).logits[0, position], -1)
        nats += log_p[tokens[0, position]].item()
    assert engine.score_sequences([sequence])[0] == pytest.approx(nats / 10, abs=1e-5)
    log_p = torch.log_softmax(reference(tokens).logits[0], -1)
    one_pass = log_p[range(1, 11), tokens[0, 1:-1]].mean().item()
    assert engine.score_sequences([sequence], "one-pass")[0] == pytest.approx(one_pass, abs=1e-5)


def test_numbers_do_not_depend_on_batch_mates_or_order(engine, sequences):
    together = engine.embed(sequences)
    scores = engine.score_sequences(sequences, "one-pass")
    tolerance = 1e-5 * np.abs(together).max()
    for i, sequence in enumerate(sequences):
        np.testing.assert_allclose(engine.embed([sequence])[0], together[i], atol=tolerance)
        alone = engine.score_sequences([sequence], "one-pass")[0]
        assert alone == pytest.approx(scores[i], abs=1e-5)
    np.testing.assert_allclose(engine.embed(sequences[::-1])[::-1], together, atol=tolerance)


def test_bf16_stays_close_to_fp32(folder, engine, sequences):
    half = Engine.load(folder, device="cpu", dtype="bf16")
    assert (half.dtype, engine.dtype) == ("bf16", "fp32")
    a, b = engine.embed(sequences), half.embed(sequences)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.9995


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(RESIDUES[:25] + "J", min_size=1, max_size=80), max_size=12))
def test_any_letters_give_finite_numbers(engine, sequences):
    embedded = engine.embed(sequences)
    assert embedded.shape == (len(sequences), 64)
    assert np.isfinite(embedded).all()
    assert np.isfinite(engine.score_sequences(sequences, "one-pass")).all()


def test_bad_input_is_one_sentence(engine):
    with pytest.raises(SequenceError, match=r"Sequence 1: .*position 3 holds '\?'"):
        engine.embed(["MK", "MK?"])
    with pytest.raises(SequenceError, match="at most 16384 residues, but 20000"):
        engine.embed(["A" * 20000])
    with pytest.raises(SequenceError, match="one string was given"):
        engine.embed("MKT")
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        engine.embed(["MK"], layers=(4,))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_batches_hold_everything_once_within_the_budget(lengths, budget):
    batches = list(plan_batches(lengths, budget))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        held = sum(lengths[i] for i in batch)
        assert held <= budget or len(batch) == 1


def test_lineage_travels_with_the_engine(engine):
    assert engine.lineage == {"step": 1}
    assert math.isfinite(engine.max_residues)
