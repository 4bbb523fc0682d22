import numpy as np
import pytest
import torch
from draws import random_sequence, random_weights

from raptide.errors import InputError
from raptide.inference.contact_fit import contact_map, fit_contacts, long_range_precision
from raptide.inference.engine import Engine


@pytest.fixture(scope="module")
def engine():
    weights = random_weights(layers=3, width=32, heads=4)
    return Engine(weights.build(), {}, torch.device("cpu"), 1024)


def answers_of_one_head(engine, sequence, layer=1, head=2):
    """A world in which one head's attention is what touches."""
    maps = list(engine.corrected_maps(sequence))[layer][head]
    contacts = (maps > np.quantile(maps, 0.9)).astype(np.float32)
    contacts[3] = contacts[:, 3] = np.nan  # a residue without coordinates
    return contacts


def test_the_head_that_marks_contacts_is_found_and_predicts_new_ones(engine):
    train = [random_sequence(n) for n in (60, 80, 100)]
    examples = [(s, answers_of_one_head(engine, s)) for s in train]
    head = fit_contacts(engine, iter(examples))
    assert head.weight.shape == (1, 12)
    assert head.weight.dtype == torch.float32
    assert head.weight.argmax() == 1 * 4 + 2
    engine.model.contact_head = head
    fresh = random_sequence(90)
    (probabilities,) = engine.contacts([fresh])
    assert np.allclose(probabilities, probabilities.T, atol=1e-6)
    precision = long_range_precision(probabilities, answers_of_one_head(engine, fresh))
    assert precision > 0.9  # by chance 0.1


def test_a_larger_penalty_keeps_fewer_heads(engine):
    sequence = random_sequence(120)
    noise = np.random.default_rng(1).random((120, 120)) < 0.2
    examples = [(sequence, (noise | noise.T).astype(np.float32))]
    used = [
        int((fit_contacts(engine, examples, penalty).weight != 0).sum()) for penalty in (0.001, 30)
    ]
    assert used[1] < used[0]


def test_bad_examples_are_refused(engine):
    with pytest.raises(InputError, match=r"Example 0: a contact map of 10 by 10 .* shape \(9, 9\)"):
        fit_contacts(engine, [("MKTAYIAKQR", np.zeros((9, 9)))])
    with pytest.raises(InputError, match="only one kind"):
        fit_contacts(engine, [("MKTAYIAKQR", np.zeros((10, 10)))])


def test_contacts_are_pairs_within_8_angstrom():
    line = np.array([[0, 0, 0], [7.9, 0, 0], [np.nan] * 3, [16, 0, 0]])
    expected = [[1, 1, np.nan, 0], [1, 1, np.nan, 0], [np.nan] * 4, [0, 0, np.nan, 1]]
    np.testing.assert_equal(contact_map(line), expected)


def test_long_range_precision_counts_the_top_l_pairs_24_apart():
    truth = np.zeros((30, 30), np.float32)
    truth[0, 25] = truth[25, 0] = 1
    near = np.zeros((30, 30))
    near[0, 1] = 1  # likeliest of all, but no long-range pair
    near[0, 25] = 0.5
    pairs = sum(30 - separation for separation in range(24, 30))
    assert pairs == 21  # fewer than L
    assert long_range_precision(near, truth) == pytest.approx(1 / 21)
    assert np.isnan(long_range_precision(np.zeros((9, 9)), np.zeros((9, 9))))
