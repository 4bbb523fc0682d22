"""Which residues are asked for: pinned, by the paper's shares, and scored as they should be."""

import hashlib

import numpy as np
import pytest
from draws import generator, random_sequence

from raptide.alphabet import FIRST_RESIDUE, encode_residues
from raptide.errors import SequenceError
from raptide.evaluation.masks import BACKGROUND, MASKED, SHUFFLED, choose_residues, score_masked

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV"
MANY = "".join("LAGVSERTIDPKQNFYMHWC"[(i * i + i // 7) % 20] for i in range(100_000))


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        (PROTEIN, "f91ae0af238a4644"),
        ("M", "62abc1ddd2d41ce1"),
        (MANY, "f9803e29d973caab"),
    ],
    ids=["a protein", "one residue", "many residues"],
)
def test_the_choice_never_changes(sequence, expected):
    chosen = choose_residues(sequence)
    arrays = [chosen.places, chosen.shown, chosen.drawn]
    text = b"".join(array.astype("<i8").tobytes() for array in arrays)
    assert hashlib.sha256(text).hexdigest()[:16] == expected


def test_the_choice_is_the_rule_in_whole_numbers():
    sequence = random_sequence(3000)
    residues = encode_residues(sequence)
    digest = hashlib.blake2b(bytes(residues), digest_size=8, person=b"raptide.masks").digest()
    key = [int.from_bytes(digest, "little"), 2021]
    bits = np.random.Philox(key=np.array(key, np.uint64))
    places, shown = [], []
    for place, raw in enumerate(map(int, bits.random_raw(len(sequence)))):
        low, high = raw % 2**32, raw // 2**32
        if low / 2**32 < 0.15:
            places.append(place)
            share = high / 2**32
            among = int((share - 0.8) / 0.1 * 20) + FIRST_RESIDUE
            shown.append(MASKED if share < 0.8 else among if share < 0.9 else residues[place])
    chosen = choose_residues(sequence)
    assert chosen.places.tolist() == places
    # Where fractions of floats and of whole numbers fall on two sides of a letter, one may differ.
    assert np.count_nonzero(chosen.shown != shown) <= 1


def test_the_shares_are_the_papers():
    chosen = choose_residues(MANY)
    residues = encode_residues(MANY)
    count = len(chosen.places)
    assert abs(count / len(MANY) - 0.15) < 5 * np.sqrt(0.15 * 0.85 / len(MANY))
    assert (np.diff(chosen.places) > 0).all()
    same = chosen.shown == residues[chosen.places]
    for share, expected in ((chosen.masked, 0.8), (same, 0.1 + 0.1 / 20)):
        assert abs(share.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / count)
    random = chosen.shown[~chosen.masked & ~same]
    assert set(random) == set(range(FIRST_RESIDUE, FIRST_RESIDUE + 20))


def test_the_drawn_letters_have_the_background_shares():
    chosen = choose_residues(MANY)
    shares = BACKGROUND / BACKGROUND.sum()
    expected = len(chosen.drawn) * shares
    found = np.bincount(chosen.drawn - FIRST_RESIDUE, minlength=20)
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()
    nats = [-np.log(shares[letter - FIRST_RESIDUE]) for letter in chosen.drawn]
    np.testing.assert_allclose(chosen.chance_nats, nats, rtol=1e-12)


def test_every_protein_has_one_and_letters_alone_count():
    for length in range(1, 40):
        sequence = random_sequence(length)
        chosen = choose_residues(sequence)
        assert 1 <= len(chosen.places) <= length
        assert 0 <= chosen.places.min() <= chosen.places.max() < length
    sequence = random_sequence(60)
    spaced = f" {sequence[:20].lower()}\n{sequence[20:]}*"
    assert choose_residues(spaced).places.tolist() == choose_residues(sequence).places.tolist()
    others = {tuple(choose_residues(sequence[:i] + "A" + sequence[i:]).places) for i in range(9)}
    assert len(others) > 1


def test_a_model_is_shown_all_but_the_chosen_residues():
    sequence = random_sequence(500)
    residues, chosen = encode_residues(sequence), choose_residues(sequence)
    tokens = chosen.corrupt(residues, mask=32)
    assert tokens.dtype == np.uint8
    changed = np.zeros(500, bool)
    changed[chosen.places] = True
    assert (tokens[~changed] == residues[~changed]).all()
    assert (np.flatnonzero(tokens == 32) == chosen.places[chosen.masked]).all()
    assert (tokens[chosen.places[~chosen.masked]] == chosen.shown[~chosen.masked]).all()


def test_scores_are_of_the_true_letters_or_of_the_drawn():
    sequence = random_sequence(200)
    residues, chosen = encode_residues(sequence), choose_residues(sequence)
    logits = generator().normal(size=(len(chosen.places), 33))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    log_p[0, [5, 6, 7]] = 1.0  # three letters are equally likely
    for method, truths in (("", residues[chosen.places]), (SHUFFLED, chosen.drawn)):
        scores = score_masked(log_p, chosen, residues, method)
        assert (scores.dtype, scores.shape) == (np.float32, (len(truths), 2))
        for i, truth in enumerate(truths.tolist()):
            assert scores[i, 0] == pytest.approx(-log_p[i, truth], rel=1e-6)
            share = (truth in (5, 6, 7)) / 3 if i == 0 else float(log_p[i].argmax() == truth)
            assert scores[i, 1] == pytest.approx(share)
    with pytest.raises(ValueError, match="know no method 'pseudo'"):
        score_masked(log_p, chosen, residues, "pseudo")


def test_what_is_no_protein_is_refused():
    with pytest.raises(SequenceError, match="at least one residue"):
        choose_residues("")
    with pytest.raises(SequenceError, match="position 3 holds '1'"):
        choose_residues("MK1")
