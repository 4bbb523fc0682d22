import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raptide.alphabet import ESM_33, ESM_35, RESIDUES, decode_residues, encode_residues
from raptide.errors import SequenceError

LETTERS = RESIDUES[:25]


def test_ids_are_those_of_fair_esm():
    import esm

    for ours, name in ((ESM_33, "ESM-1b"), (ESM_35, "ESM-1")):
        theirs = esm.Alphabet.from_architecture(name)
        assert list(ours.tokens) == theirs.all_toks
        assert (ours.cls, ours.pad, ours.eos, ours.mask) == (
            theirs.cls_idx,
            theirs.padding_idx,
            theirs.eos_idx,
            theirs.mask_idx,
        )
        assert ours.append_eos == theirs.append_eos


@given(st.text(LETTERS, min_size=1))
def test_letters_survive_a_round_trip(letters):
    assert decode_residues(encode_residues(letters)) == letters


def test_case_blanks_stop_and_j_follow_the_documented_rule():
    assert decode_residues(encode_residues("mk t\nJa*")) == "MKTXA"


@pytest.mark.parametrize("letters", ["", " \n", "*"])
def test_an_empty_sequence_is_refused(letters):
    with pytest.raises(SequenceError, match="at least one residue"):
        encode_residues(letters)


@pytest.mark.parametrize(
    ("letters", "shown"), [("MK1", "position 3 holds '1'"), ("M*K", "position 2"), ("Mé", "2")]
)
def test_what_is_no_residue_is_named_with_its_position(letters, shown):
    with pytest.raises(SequenceError, match=shown):
        encode_residues(letters)


def test_specials_surround_a_sequence():
    residues = np.array([20, 15], np.uint8)
    assert ESM_33.add_specials(residues).tolist() == [0, 20, 15, 2]
    assert ESM_35.add_specials(residues).tolist() == [32, 20, 15]
