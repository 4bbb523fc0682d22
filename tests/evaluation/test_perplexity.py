"""The task `perplexity`: planted subjects whose ECE is known, baselines by hand, its control."""

import hashlib
from contextlib import contextmanager

import numpy as np
import pytest
from draws import LETTERS, generator, random_sequence

from raptide import Corpus
from raptide.alphabet import STANDARD, decode_sequences, encode_residues
from raptide.config import parse_settings
from raptide.errors import ConfigError, CorpusError, FastaError, InputError
from raptide.evaluation import counting
from raptide.evaluation.counting import CorpusText, count_ngrams
from raptide.evaluation.masks import BACKGROUND, choose_residues, score_masked
from raptide.evaluation.ngrams import Ngrams
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.subjects.ngrams import natural_unigram, ngram, uniform
from raptide.evaluation.tasks.perplexity import PerplexitySettings, PerplexityTask
from raptide.training.watching import heldout


class Planted:
    """A subject that gives the chosen residues of a protein whatever log p a function says.

    Args:
        log_p: from residue ids [L] and those that are chosen to log p of each token, [C, 33].
    """

    name, digest, baseline, layers, kinds = "planted", "0", False, 0, frozenset({"masked"})

    def __init__(self, log_p):
        self.log_p = log_p

    @contextmanager
    def read(self, ask):
        yield self

    def get(self, request):
        residues, chosen = encode_residues(request.sequence), choose_residues(request.sequence)
        log_p = self.log_p(residues, chosen)
        return score_masked(log_p, chosen, residues, request.reading.method)


def sure_of(letters, p):
    """log p of 33 tokens where the given letters have probability p, the 24 others the rest."""
    log_p = np.full((len(letters), 33), -np.inf)
    log_p[:, 4:29] = np.log((1 - p) / 24)
    log_p[np.arange(len(letters)), letters] = np.log(p)
    return log_p


def fasta(path, sequences):
    path.write_text("".join(f">p{i}\n{each}\n" for i, each in enumerate(sequences)))
    return path


@pytest.fixture
def proteins():
    return [random_sequence(length) for length in (3, 60, 128, 129, 200, 256, 300, 513, 700)]


@pytest.fixture
def task(tmp_path, proteins):
    return make_task(tmp_path, proteins)


def make_task(folder, sequences, **settings):
    file = fasta(folder / "asked.fasta", sequences)
    settings = {"fasta": file, "train_fasta": file} | settings
    return PerplexityTask(PerplexitySettings(**settings), folder / "cache")


def values(task, subject):
    with subject.read(lambda: task.requests(subject)) as readings:
        outcome = task.measure(subject, readings)
    return {each.metric: each.sample.value() for each in outcome.measures}, outcome


def test_a_planted_subject_has_the_ece_that_was_planted(task, proteins):
    subject = Planted(lambda residues, chosen: sure_of(residues[chosen.places], 0.25))
    found, outcome = values(task, subject)
    assert found["ece"] == pytest.approx(4, rel=1e-6)
    assert found["ece-masked"] == pytest.approx(4, rel=1e-6)
    assert found["accuracy"] == 1
    roles = {each.metric: (each.role, each.higher_is_better) for each in outcome.measures}
    assert roles == {
        "ece-masked": ("main", False),
        "ece": ("more", False),
        "accuracy": ("more", True),
        **{f"ece/{name}": ("more", False) for name in ("1-128", "129-256", "257-512", "513-")},
        "control/ece-masked": ("control", False),
        "chance/ece-masked": ("chance", False),
    }
    assert {each.dataset for each in outcome.measures} == {"asked"}
    assert all(each.sample.units for each in outcome.measures)
    total = sum(len(choose_residues(each).places) for each in proteins)
    assert outcome.notes[0].startswith(f"9 of 9 proteins, with {total} chosen residues")


def test_noise_of_known_strength_and_a_copy_of_what_is_shown(task, proteins):
    """Right in a share of the masked residues, the next letter elsewhere; the others are copied."""

    def log_p(residues, chosen):
        true = residues[chosen.places].astype(int)
        shifted = 4 + (true - 3) % 20
        wrong = chosen.masked & (chosen.places % 3 == 0)
        return sure_of(np.where(chosen.masked, np.where(wrong, shifted, true), chosen.shown), 0.5)

    found, _ = values(task, Planted(log_p))
    all_nats, masked_nats, right, control, chance = [], [], [], [], []
    shares = dict(zip(LETTERS, BACKGROUND / BACKGROUND.sum(), strict=True))
    for protein in proteins:
        chosen = choose_residues(protein)
        for place, shown, drawn in zip(chosen.places, chosen.shown, chosen.drawn, strict=True):
            true, drawn = LETTERS.index(protein[place]), drawn - 4
            said = (true + (place % 3 == 0)) % 20 if shown < 0 else shown - 4
            nats = -np.log(0.5 if said == true else 0.5 / 24)
            all_nats.append(nats)
            if shown < 0:
                masked_nats.append(nats)
                right.append(said == true)
                control.append(-np.log(0.5 if said == drawn else 0.5 / 24))
                chance.append(-np.log(shares[LETTERS[drawn]]))
    assert found["ece"] == pytest.approx(np.exp(np.mean(all_nats)), rel=1e-6)
    assert found["ece-masked"] == pytest.approx(np.exp(np.mean(masked_nats)), rel=1e-6)
    assert found["accuracy"] == pytest.approx(np.mean(right), rel=1e-9)
    assert found["control/ece-masked"] == pytest.approx(np.exp(np.mean(control)), rel=1e-6)
    assert found["chance/ece-masked"] == pytest.approx(np.exp(np.mean(chance)), rel=1e-9)


def test_lengths_are_those_of_training(task, proteins):
    def log_p(residues, chosen):
        return sure_of(
            residues[chosen.places], 1 / (2 + np.searchsorted([128, 256, 512], len(residues)))
        )

    found, outcome = values(task, Planted(log_p))
    by_length = {name: value for name, value in found.items() if name.startswith("ece/")}
    assert list(by_length) == [f"ece/{name}" for name in heldout.bucket_names()]
    np.testing.assert_allclose(list(by_length.values()), [2, 3, 4, 5], rtol=1e-6)
    (figure,) = outcome.figures
    np.testing.assert_allclose(figure.series["ECE"], [2, 3, 4, 5], rtol=1e-6)
    assert figure.x_names == heldout.bucket_names()


def test_a_length_that_no_protein_has_is_left_out(tmp_path):
    task = make_task(tmp_path, [random_sequence(200)])
    found, outcome = values(task, uniform())
    assert [name for name in found if name.startswith("ece/")] == ["ece/129-256"]
    assert np.isnan(outcome.figures[0].series["ECE"]).tolist() == [True, False, True, True]


def test_uniform_is_25_whatever_the_letters_are(task):
    found, _ = values(task, uniform())
    for name, value in found.items():
        if "ece" in name and "chance" not in name:
            assert value == pytest.approx(25, rel=1e-6), name
    assert found["accuracy"] == pytest.approx(1 / 25, rel=1e-6)


@pytest.fixture(scope="module")
def real(corpus, tmp_path_factory):
    """The task on the proteome's held-out side, and what each baseline comes to."""
    task = PerplexityTask(PerplexitySettings(corpus=corpus.path), tmp_path_factory.mktemp("cache"))
    return task, {each.name: values(task, each) for each in task.baselines()}


def heldout_sequences(corpus):
    for row in corpus.blocks("heldout"):
        block = corpus.read_block(row)
        yield from decode_sequences(block.residues, np.diff(block.residue_splits))


def test_the_unigram_and_the_4_gram_are_what_they_are_by_hand(real, corpus):
    counts = count_ngrams(CorpusText.of(corpus, "train", "representatives"))
    trained = [corpus.read_block(row).residues for row in corpus.blocks("train")]
    seen = np.bincount(np.concatenate(trained), minlength=29)[4:29] + 1
    unigram, four = np.log(seen / seen.sum()), Ngrams(counts, 4)
    nats = {"unigram": [], "4-gram": []}
    for sequence in heldout_sequences(corpus):
        residues, chosen = encode_residues(sequence), choose_residues(sequence)
        for place in chosen.places[chosen.masked]:
            nats["unigram"].append(-unigram[residues[place] - 4])
            nats["4-gram"].append(-four.log_p(residues[: place + 1])[-1, residues[place] - 4])
    for name, each in nats.items():
        assert real[1][name][0]["ece-masked"] == pytest.approx(np.exp(np.mean(each)), rel=1e-6)


def test_baselines_stand_in_their_order_on_real_proteins(real):
    ece = {name: found["ece-masked"] for name, (found, _) in real[1].items()}
    assert list(ece) == ["uniform", "unigram", "2-gram", "3-gram", "4-gram"]
    assert ece["3-gram"] < ece["2-gram"] < ece["unigram"] < 18 < ece["uniform"]


def better_than_chance(outcome):
    """Whether the control is, by the paired bootstrap's 95% interval."""
    samples = {each.metric: each.sample for each in outcome.measures}
    control, chance = samples["control/ece-masked"], samples["chance/ece-masked"]
    counts = generator().multinomial(control.units, [1 / control.units] * control.units, 1000)
    return np.quantile(control.replicates(counts) - chance.replicates(counts), 0.975) < 0


def test_no_baseline_predicts_drawn_letters_better_than_chance(real):
    for name, (_, outcome) in real[1].items():
        assert not better_than_chance(outcome), name


def test_to_know_a_proteins_composition_is_no_use_in_the_control_and_to_leak_labels_is_seen(real):
    task, baselines = real

    def composition(residues, chosen):
        counts = np.bincount(residues, minlength=33) + 1e-3
        return np.broadcast_to(np.log(counts / counts.sum()), (len(chosen.places), 33))

    knows = values(task, Planted(composition))
    assert knows[0]["ece-masked"] < baselines["unigram"][0]["ece-masked"] - 0.5
    assert not better_than_chance(knows[1])

    class Leaks(Planted):
        def get(self, request):
            return super().get(request._replace(reading=Reading("masked")))

    assert better_than_chance(values(task, Leaks(composition))[1])


def test_the_first_by_hash_are_taken_each_once(tmp_path, proteins):
    def asked(most, sequences):
        task = make_task(tmp_path, sequences, most_proteins=most)
        first = [request.sequence for request in task.requests(uniform())]
        assert first == [request.sequence for request in task.requests(uniform())]
        assert first[::2] == first[1::2], "each is read with its true letters and with drawn ones"
        return first[::2], values(task, uniform())[1].notes[0]

    def place(sequence):
        name = hashlib.blake2b(sequence.encode(), digest_size=8, person=b"raptide.subset")
        return int.from_bytes(name.digest(), "little")

    in_order = sorted(proteins, key=place)
    for most in (1, 4, 9, 100):
        taken, note = asked(most, proteins)
        assert taken == [each for each in proteins if each in in_order[:most]], (
            "in the file's order"
        )
        assert note.startswith(f"{min(most, 9)} of 9 proteins")
    taken, _ = asked(4, proteins[::-1] + proteins)
    assert sorted(taken) == sorted(in_order[:4]), "equal sequences count once"


def test_counting_is_done_once_for_the_same_data(cluster, tmp_path, proteins, monkeypatch):
    made = []
    monkeypatch.setattr(counting, "count_ngrams", lambda text: made.append(1) or count_ngrams(text))
    task = make_task(tmp_path, proteins)
    assert not made, "nothing is counted before it is asked for"
    first = [values(task, each)[0] for each in task.baselines()]
    assert [values(make_task(tmp_path, proteins), each)[0] for each in task.baselines()] == first
    assert len(made) == 1
    digests = {each.name: each.digest for each in task.baselines()}
    assert len(set(digests.values())) == 5

    counts = tmp_path / next((tmp_path / "cache").iterdir())
    given = make_task(tmp_path, proteins, train_fasta=None, counts=counts)
    assert [values(given, each)[0] for each in given.baselines()] == first
    assert len(made) == 1
    assert given.files() == [tmp_path / "asked.fasta", counts]

    other = make_task(tmp_path, [*proteins, "MKLV"])
    assert {each.name for each in other.baselines() if each.digest == digests[each.name]} == {
        "uniform"
    }


def test_the_files_that_numbers_depend_on(task, corpus, tmp_path):
    assert task.files() == [tmp_path / "asked.fasta"] * 2
    real = PerplexityTask(PerplexitySettings(corpus=corpus.path), tmp_path)
    assert real.files() == [corpus.path / "manifest.json"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either corpus or fasta"),
        ({"corpus": "c", "fasta": "f"}, "give either corpus or fasta"),
        ({"fasta": "f"}, "fasta, and it alone, needs train_fasta, or counts instead"),
        ({"corpus": "c", "train_fasta": "f"}, "fasta, and it alone, needs train_fasta"),
        ({"corpus": "c", "most_proteins": 0}, "`most_proteins` is 0"),
        ({"corpus": "c", "mots_proteins": 1}, "did you mean `most_proteins`"),
    ],
)
def test_settings_that_say_nothing_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(PerplexitySettings, given, source="b.yaml")


def test_data_that_cannot_be_asked_are_refused_in_a_sentence(corpus, tmp_path, monkeypatch):
    good = fasta(tmp_path / "good.fasta", ["MKLV"])
    bad = fasta(tmp_path / "bad.fasta", ["MKLV", "MK1"])

    def make(**settings):
        return PerplexityTask(PerplexitySettings(**settings), tmp_path)

    with pytest.raises(FastaError, match=r"bad\.fasta:3: record 'p1'"):
        make(fasta=bad, train_fasta=good)
    with pytest.raises(FastaError, match="none is not there"):
        make(fasta=good, train_fasta=tmp_path / "none")
    with pytest.raises(CorpusError, match="holds no finished corpus"):
        make(corpus=tmp_path)
    with pytest.raises(InputError, match=r"good\.fasta holds no n-gram counts"):
        make(fasta=good, counts=good)
    monkeypatch.setattr(Corpus, "blocks", lambda self, split: [])
    with pytest.raises(CorpusError, match="has no held-out clusters to evaluate on"):
        make(corpus=corpus.path)


def test_a_letter_baseline_gives_what_it_has(corpus):
    subject = natural_unigram()
    with subject.read(lambda: iter(())) as readings:
        got = readings.get(Request(Reading("marginals", method="wt-marginals"), "MKLV", (2, 0, 3)))
        assert got.shape == (3, 20)
        assert got.dtype == np.float32
        shares = dict(zip(LETTERS, BACKGROUND / BACKGROUND.sum(), strict=True))
        expected = np.log([shares[letter] for letter in STANDARD])
        np.testing.assert_allclose(got, np.broadcast_to(expected, (3, 20)), atol=2e-3)
        assert readings.get(Request(Reading("marginals"), "MKLV")).shape == (0, 20)
        with pytest.raises(KeyError):
            readings.get(Request(Reading("mean"), "MKLV"))
    counts = count_ngrams(CorpusText.of(corpus, "train", "all"))
    two = ngram(2, "x", lambda: counts)
    assert (two.name, two.baseline, two.layers) == ("2-gram", True, 0)
    with two.read(lambda: iter(())) as readings, pytest.raises(KeyError):
        readings.get(Request(Reading("marginals"), "MKLV", (0,)))
