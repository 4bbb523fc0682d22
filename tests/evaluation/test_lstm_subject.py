"""An LSTM as a subject: the chosen residues of every model, in a context without a mask."""

import numpy as np
import pytest
import torch
from draws import random_sequence

from raptide.alphabet import STANDARD, encode_residues
from raptide.bulk.work import Model
from raptide.calls.scoring import log_softmax
from raptide.evaluation.masks import choose_residues
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.run import answers
from raptide.evaluation.subjects.model import ModelSubject, random_weights
from raptide.evaluation.subjects.readers import HereReader
from raptide.evaluation.tasks.variants import Variants, VariantsSettings
from raptide.inference.engine import Engine
from raptide.model.families import make_model
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.weights import Weights
from raptide.model.lstm.config import LstmSettings


@pytest.fixture
def subject(tmp_path):
    model = make_model(LstmSettings(layers=2, width=32)).initialise(3)
    with torch.no_grad():
        model.head_weight.mul_(8)
    write_weights(tmp_path / "lstm", Weights.of(model))
    found = Model.find(tmp_path / "lstm")
    return ModelSubject("lstm", found, "fp32", HereReader(), tmp_path / "scratch")


def test_readings_are_the_engines_numbers_on_the_clean_protein(subject):
    sequence = random_sequence(80)
    places = (0, 40, 79)
    masked = Request(Reading("masked"), sequence)
    marginals = Request(Reading("marginals", method="wt-marginals"), sequence, places)
    letters = Request(Reading("letters"), "")
    mean = Request(Reading("mean", 2), sequence)
    asked = [masked, marginals, letters, mean]
    with subject.read(lambda: iter(asked)) as readings:
        found = {request.key: readings.get(request).copy() for request in asked}
    engine = Engine.load(subject.model.path, dtype="fp32")
    log_p = log_softmax(engine.logits([sequence])[0])
    chosen = choose_residues(sequence)
    truth = encode_residues(sequence)[chosen.places]
    nats = -log_p[chosen.places, truth]
    assert nats.std() > 0.1
    np.testing.assert_allclose(found[masked.key][:, 0], nats, atol=1e-4)
    tokens = [engine.tokens.index(letter) for letter in STANDARD]
    expected = log_p[list(places)][:, tokens]
    np.testing.assert_allclose(found[marginals.key], expected, atol=1e-4)
    np.testing.assert_allclose(found[mean.key], engine.embed([sequence])[0], atol=1e-5)
    rows = engine.model.head_weight[tokens].detach().numpy()
    np.testing.assert_array_equal(found[letters.key], rows)


def test_it_is_asked_what_it_can_answer(subject, tmp_path):
    assert not {"contacts", "pseudo"} & subject.kinds
    assays = "jobs/benchmarks/tiny/variants/*.parquet"
    settings = VariantsSettings(kind="variants", assays=assays)
    task = Variants(settings)
    assert answers(subject, task)
    assert task.methods(subject) == ["wt-marginals"]
    assert {r.reading.method for r in task.requests(subject)} == {"wt-marginals"}


def test_random_weights_of_its_shape_are_an_lstm(subject, tmp_path):
    other = random_weights(subject, tmp_path)
    assert read_weights(other.model.path).settings == LstmSettings(layers=2, width=32)
    assert other.digest != subject.digest
