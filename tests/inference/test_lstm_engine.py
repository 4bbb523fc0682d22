"""The engine with an LSTM: all that one pass gives, and refusals that name it."""

import numpy as np
import pytest
import torch
from draws import random_sequence

from raptide.alphabet import STANDARD
from raptide.bulk.variants import VariantWork
from raptide.bulk.work import Model, ScanWork, ScoreWork
from raptide.errors import BundleError, ConfigError
from raptide.inference.contact_fit import fit_contacts
from raptide.inference.engine import Engine
from raptide.model.families import make_model
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.lstm.config import LstmSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "lstm"
    model = make_model(LstmSettings(layers=2, width=32)).initialise(3)
    with torch.no_grad():
        model.head_weight.mul_(8)  # far from uniform, so that differences show
    write_weights(folder, Weights.of(model))
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder, device="cpu", dtype="fp32", max_batch_tokens=256)


def test_embeddings_and_scores_do_not_depend_on_the_call(engine):
    sequences = [random_sequence(n) for n in (30, 1, 200, 7, 400, 64)]
    embedded = engine.embed(sequences, layers=(0, 1, -1))
    scores = engine.score_sequences(sequences, "one-pass")
    assert embedded.shape == (6, 3, 32)
    for i, sequence in enumerate(sequences):
        alone = engine.embed([sequence], layers=(0, 1, -1))[0]
        np.testing.assert_allclose(embedded[i], alone, atol=1e-5)
        assert scores[i] == pytest.approx(engine.score_sequences([sequence], "one-pass")[0])


def test_one_pass_is_the_pseudo_likelihood_already(engine):
    """log p of each residue given all others: no substitution there changes what it is read off."""
    sequence = random_sequence(40)
    (logits,) = engine.logits([sequence])
    for place in (0, 17, 39):
        for letter in STANDARD:
            changed = sequence[:place] + letter + sequence[place + 1 :]
            np.testing.assert_allclose(engine.logits([changed])[0][place], logits[place], atol=1e-5)
    scan = engine.scan(sequence)
    assert scan.std() > 0.1
    variant = f"{sequence[17]}18{'A' if sequence[17] != 'A' else 'C'}"
    (score,) = engine.score_variants(sequence, [variant])
    assert score == pytest.approx(scan[17, STANDARD.index(variant[-1])], abs=1e-5)


def test_what_it_cannot_do_is_refused_with_what_it_can(engine):
    sequence = random_sequence(20)
    change = f"{sequence[3]}4{'A' if sequence[3] != 'A' else 'C'}"
    for call in (
        lambda: engine.score_sequences([sequence]),
        lambda: engine.score_variants(sequence, [change], "masked-marginals"),
        lambda: engine.score_variants(sequence, [change], "pseudo-ppl"),
        lambda: engine.scan(sequence, "masked-marginals"),
        lambda: engine.masked_log_p([(sequence, [3])]),
    ):
        with pytest.raises(BundleError, match="take one-pass for sequences and wt-marginals"):
            call()
    for call in (
        lambda: engine.contacts([sequence]),
        lambda: engine.corrected_maps(sequence),
        lambda: fit_contacts(engine, [(sequence, np.eye(20, dtype=np.float32))]),
    ):
        with pytest.raises(BundleError, match=r"no attention maps .* gives embeddings, logits"):
            call()


def test_jobs_refuse_it_before_they_start(folder):
    model = Model.find(folder)
    ScoreWork(model, "fp32", "error", "one-pass")
    ScanWork(model, "fp32", "error")
    VariantWork((model,), "fp32", "error", ("wt-marginals",), ("a",))
    for make in (
        lambda: ScoreWork(model, "fp32", "error"),
        lambda: ScanWork(model, "fp32", "error", "masked-marginals"),
        lambda: VariantWork((model,), "fp32", "error", ("masked-marginals",), ("a",)),
    ):
        with pytest.raises(ConfigError, match="which an LSTM does not read"):
            make()
