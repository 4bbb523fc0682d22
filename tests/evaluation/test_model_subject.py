"""What is read off a model is what the engine gives, however it is read."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from draws import random_sequence
from safetensors.torch import load_file, save_file

from raptide import ConfigError, Engine, RaptideError
from raptide.alphabet import STANDARD, encode_residues
from raptide.bulk.places import BulkSettings
from raptide.bulk.work import Model
from raptide.errors import InputError
from raptide.evaluation.masks import choose_residues
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.subjects.items import Item, gather
from raptide.evaluation.subjects.model import ModelSubject, random_weights
from raptide.evaluation.subjects.readers import BulkReader, HereReader
from raptide.inference.contact_fit import fit_contacts
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.tensor_files import SAFETENSORS
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm

LAST = 2


@pytest.fixture(scope="module")
def engine(bundle):
    return Engine.load(bundle, dtype="fp32")


@pytest.fixture(scope="module")
def proteins():
    return [random_sequence(length) for length in (30, 1, 75, 41, 30, 12)]


@pytest.fixture(scope="module")
def examples():
    maps = []
    for sequence in (random_sequence(40), random_sequence(50)):
        contacts = np.random.default_rng(len(sequence)).random((len(sequence),) * 2) < 0.2
        maps.append((sequence, (contacts | contacts.T).astype(np.float32)))
    return maps


def requests_for(proteins):
    for sequence in proteins:
        yield Request(Reading("residues", LAST), sequence)
        yield Request(Reading("residues", 1), sequence)
        yield Request(Reading("mean", LAST), sequence)
        yield Request(Reading("sites", LAST), sequence, (0, len(sequence) - 1))
        yield Request(Reading("contacts", method="fit"), sequence)
        yield Request(Reading("masked"), sequence)
        yield Request(Reading("marginals", method="wt-marginals"), sequence, (0,))
        yield Request(Reading("marginals", method="masked-marginals"), sequence, (0,))
        yield Request(Reading("pseudo"), sequence)
        yield Request(Reading("mean", LAST), sequence)  # some ask twice
    yield Request(Reading("letters"), "")


def subject_of(bundle, reader, folder, examples):
    return ModelSubject(
        "model", Model.find(bundle), "fp32", reader, folder / "scratch", {"fit": examples}
    )


@pytest.fixture(scope="module")
def read_here(bundle, proteins, examples, tmp_path_factory):
    subject = subject_of(bundle, HereReader(), tmp_path_factory.mktemp("here"), examples)
    with subject.read(lambda: requests_for(proteins)) as readings:
        yield {request.key: readings.get(request).copy() for request in requests_for(proteins)}
    assert not subject.scratch.exists()


def test_readings_are_the_engines_numbers(engine, proteins, examples, read_here):
    def got(kind, sequence, layer=-1, method="", places=()):
        return read_here[Request(Reading(kind, layer, method), sequence, places).key]

    head = fit_contacts(engine, examples)
    for sequence in proteins:
        (residues,) = engine.embed([sequence], (1, LAST), "residue")
        close = {"rtol": 0, "atol": 1e-5}
        np.testing.assert_allclose(got("residues", sequence, 1), residues[0], **close)
        np.testing.assert_allclose(got("residues", sequence, LAST), residues[1], **close)
        np.testing.assert_allclose(
            got("mean", sequence, LAST), engine.embed([sequence], (LAST,))[0], **close
        )
        ends = (0, len(sequence) - 1)
        np.testing.assert_allclose(
            got("sites", sequence, LAST, places=ends), residues[1][list(ends)], **close
        )
        pseudo = engine.score_sequences([sequence])[0] * len(sequence)
        np.testing.assert_allclose(got("pseudo", sequence), [pseudo], rtol=1e-5)
        for method in ("wt-marginals", "masked-marginals"):
            row = got("marginals", sequence, method=method, places=(0,))[0]
            scan = engine.scan(sequence, method)[0]
            np.testing.assert_allclose(row - row[STANDARD.index(sequence[0])], scan, **close)
        engine.model.contact_head = head
        (contacts,) = engine.contacts([sequence])
        engine.model.contact_head = None
        upper = np.triu_indices(len(sequence), 1)
        found = got("contacts", sequence, method="fit")
        np.testing.assert_allclose(found[upper], contacts[upper], **close)
        np.testing.assert_array_equal(found, found.T)


def test_masked_residues_are_scored_on_the_corrupted_protein(engine, proteins, read_here):
    for sequence in proteins:
        chosen = choose_residues(sequence)
        found = read_here[Request(Reading("masked"), sequence).key]
        assert found.shape == (len(chosen.places), 2)
        truth = encode_residues(sequence)[chosen.places]
        only = [i for i, masked in enumerate(chosen.masked) if masked]
        if len(only) == len(chosen.places) == 1:  # then the engine's masked pass is the same one
            ((row,),) = engine.masked_log_p([(sequence, chosen.places)])
            np.testing.assert_allclose(found[0, 0], -row[truth[0]], rtol=1e-5)
    assert any(len(choose_residues(sequence).places) > 1 for sequence in proteins)


def test_letters_are_the_rows_of_the_output_head(engine, read_here):
    rows = read_here[Request(Reading("letters"), "").key]
    tokens = [engine.tokens.index(letter) for letter in STANDARD]
    np.testing.assert_array_equal(rows, engine.model.embed.weight[tokens].detach().numpy())


def test_a_bulk_job_reads_the_same(bundle, proteins, examples, read_here, tmp_path, cluster):
    reader = BulkReader(BulkSettings(workers=2))
    subject = subject_of(bundle, reader, tmp_path, examples)
    with subject.read(lambda: requests_for(proteins)) as readings:
        for request in requests_for(proteins):
            np.testing.assert_allclose(
                readings.get(request), read_here[request.key], rtol=1e-4, atol=1e-5
            )
    assert not subject.scratch.exists()


def test_a_killed_reading_of_other_things_does_not_stand_in_the_way(
    bundle, proteins, tmp_path, cluster
):
    reader = BulkReader(BulkSettings(workers=1))
    subject = subject_of(bundle, reader, tmp_path, [])

    def ask_more():
        yield Request(Reading("mean", 0), proteins[0])
        yield Request(Reading("mean", 0), proteins[1])

    with pytest.raises(ZeroDivisionError), subject.read(lambda: iter(list(ask_more())[:1])):
        raise ZeroDivisionError  # as a kill would, it leaves the scratch where it is
    (subject.scratch / "values.f32").unlink(missing_ok=True)
    with subject.read(ask_more) as readings:
        assert readings.get(Request(Reading("mean", 0), proteins[1])).shape == (
            Model.find(bundle).width,
        )


def test_a_protein_passes_once_for_all_that_is_asked(proteins):
    items = gather(requests_for(proteins))
    assert [item.sequence for item in items] == [*dict.fromkeys(proteins), ""]
    assert all(len(item.wants) == 9 for item in items[:-1])
    for a, b in combinations([request.key for item in items for request in item.requests()], 2):
        assert a != b


def test_an_item_survives_its_text(proteins):
    for item in gather(requests_for(proteins)):
        assert Item.read(item.write()) == item


def test_what_was_not_asked_is_not_answered(bundle, proteins, tmp_path):
    subject = subject_of(bundle, HereReader(), tmp_path, [])
    with (
        subject.read(lambda: iter([Request(Reading("mean", 0), proteins[0])])) as readings,
        pytest.raises(KeyError),
    ):
        readings.get(Request(Reading("mean", 1), proteins[0]))


def test_a_small_disk_is_told_before_anything_is_computed(bundle, tmp_path, monkeypatch):
    import shutil

    subject = subject_of(bundle, HereReader(), tmp_path, [])
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    ask = [Request(Reading("residues", 0), random_sequence(500))]
    with pytest.raises(ConfigError, match="free"), subject.read(lambda: iter(ask)):
        pass


def test_random_weights_have_the_models_shape_and_nothing_else(bundle, tmp_path):
    model = subject_of(bundle, HereReader(), tmp_path, [])
    control = random_weights(model, tmp_path / "controls")
    again = random_weights(model, tmp_path / "controls")
    assert control.baseline
    assert control.name == "random-weights"
    assert control.digest == again.digest != model.digest
    theirs, ours = (Engine.load(each.model.path).model for each in (control, model))
    assert theirs.settings == ours.settings
    assert not np.allclose(theirs.embed.weight.detach().float(), ours.embed.weight.detach().float())


def save(folder, model):
    write_weights(folder, Weights.of(model))
    return folder


def test_contacts_of_chains_longer_than_the_model_takes_are_refused_at_once(examples, tmp_path):
    shape = ModelSettings(family="esm1b", layers=2, width=32, heads=4, max_positions=42)
    bundle = save(tmp_path / "short", Esm(shape).initialise(1))

    def read(fit_on, length):
        subject = subject_of(bundle, HereReader(), tmp_path, fit_on)
        request = Request(Reading("contacts", method="fit"), random_sequence(length))
        with subject.read(lambda: iter([request])) as readings:
            return readings.get(request).shape

    assert read(examples[:1], 40) == (40, 40)
    remedy = "takes 40 residues at most, but one has {}; give the task `most_residues: 40`"
    with pytest.raises(InputError, match=remedy.format(41)):
        read(examples[:1], 41)
    with pytest.raises(InputError, match=remedy.format(50)):
        read(examples, 40)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("kind", ["residues", "masked", "marginals", "contacts", "letters"])
def test_weights_that_have_diverged_give_a_sentence_and_no_number(kind, examples, tmp_path):
    """Raptide writes no such bundle; other programs, and earlier releases, do."""
    bundle = save(tmp_path / "nan", Esm(ModelSettings(layers=2, width=32, heads=4)).initialise(1))
    tensors = load_file(bundle / SAFETENSORS)
    trained = (name for name in tensors if not name.endswith("inv_freq"))
    spoiled = tensors | {name: torch.full_like(tensors[name], torch.nan) for name in trained}
    save_file(spoiled, bundle / SAFETENSORS)
    subject = subject_of(bundle, HereReader(), tmp_path, examples)
    places = (0,) if kind == "marginals" else ()
    method = {"contacts": "fit", "marginals": "wt-marginals"}.get(kind, "")
    request = Request(Reading(kind, 1, method), "" if kind == "letters" else "MKTAYI", places)
    with (
        pytest.raises(InputError, match=r"NaN or inf.*diverged.*earlier checkpoint"),
        subject.read(lambda: iter([request])),
    ):
        pass


def test_a_place_that_cannot_be_written_is_a_sentence(bundle, tmp_path):
    (tmp_path / "scratch").write_text("a file where the folder would be")
    subject = subject_of(bundle, HereReader(), tmp_path, [])
    ask = [Request(Reading("mean", 0), "MKT")]
    with (
        pytest.raises(RaptideError, match=r"cannot be kept in .*scratch.*--cache"),
        subject.read(lambda: iter(ask)),
    ):
        pass
