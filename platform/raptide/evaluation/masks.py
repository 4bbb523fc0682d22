"""Which residues of a protein are asked for, and how they are shown: the same for every model.

By the paper's rule each residue is chosen with probability 15%, and of the chosen ones 80% are
shown as `<mask>`, 10% as a random residue and 10% as they are. The random bits are raw Philox
output (Salmon et al., SC 2011) keyed by a hash of the protein, in integer arithmetic alone, so a
choice depends neither on a training recipe nor on the rest of a test set, a machine or a numpy.

Shape letters: L residues of a protein, C chosen ones, V tokens of an alphabet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raptide.alphabet import FIRST_RESIDUE, NUM_STANDARD, encode_residues

SEED = 2021

CHOSEN_SHARE = 15
"""Percent of the residues that are chosen; at least one of a protein is."""

MASK_SHARE, RANDOM_SHARE = 80, 90
"""Percent of the chosen residues up to which `<mask>`, then a random residue, takes their place."""

MASKED = -1
"""What stands for `<mask>`, whose id differs between alphabets."""

SHUFFLED = "shuffled"
"""The method that scores drawn letters in place of the true ones."""

BACKGROUND = np.array(
    [
        *(965, 825, 707, 686, 664, 672, 553, 535, 591, 546),
        *(474, 580, 393, 406, 386, 292, 241, 227, 110, 138),
    ]
)
"""How often the standard letters, by id, occur in 9,991 residues of Swiss-Prot, about, [20]."""

_UP_TO = np.cumsum(BACKGROUND).astype(np.uint64)


@dataclass(frozen=True)
class Chosen:
    """The residues of one protein that are asked for; arrays are read-only."""

    places: np.ndarray
    """Counted from 0, ascending, [C] int64."""

    shown: np.ndarray
    """The residue id that stands there, or MASKED, [C] int64."""

    drawn: np.ndarray
    """Ids of letters that have nothing to do with the protein, [C] int64. Drawn by the background
    shares: were the protein's own letters shuffled, to know its composition would be enough to
    predict them better than chance."""

    @property
    def masked(self) -> np.ndarray:
        """Which of them are shown as `<mask>`, [C] bool."""
        return self.shown == MASKED

    @property
    def chance_nats(self) -> np.ndarray:
        """-log of the share by which each drawn letter was drawn, [C] float64. On the average no
        prediction made without a look at the draw takes fewer nats."""
        return -np.log(BACKGROUND / BACKGROUND.sum())[self.drawn - FIRST_RESIDUE]

    def truth(self, residues_L: np.ndarray, method: str = "") -> np.ndarray:
        """Ids of the letters to be scored: the true ones, or for SHUFFLED the drawn, [C] int64."""
        if method not in ("", SHUFFLED):
            raise ValueError(f"masked residues know no method {method!r}")
        return self.drawn if method else residues_L[self.places].astype(np.int64)

    def corrupt(self, residues_L: np.ndarray, mask: int) -> np.ndarray:
        """The protein as a model is shown it, [L] uint8; `mask` is the id of its `<mask>`."""
        tokens = residues_L.copy()
        tokens[self.places] = np.where(self.masked, mask, self.shown)
        return tokens


@lru_cache(maxsize=4)  # a protein is asked for several times in a row
def choose_residues(sequence: str) -> Chosen:
    """Choose residues of a protein; letters alone count, neither their case nor blanks.

    Raises:
        SequenceError: it is empty, or holds something that is no residue letter.
    """
    residues = encode_residues(sequence)
    digest = hashlib.blake2b(residues.tobytes(), digest_size=8, person=b"raptide.masks").digest()
    key = np.array([int.from_bytes(digest, "little"), SEED], np.uint64)
    bits = np.random.Philox(key=key)

    # As in training: the low half of a draw chooses a residue, the high half says what is shown.
    raw = bits.random_raw(len(residues))
    low = raw & np.uint64(0xFFFFFFFF)
    places = np.flatnonzero(low < CHOSEN_SHARE * 2**32 // 100)
    if not len(places):
        places = np.array([low.argmin()])
    action = raw[places] >> np.uint64(32)
    to_mask, to_random = (np.uint64(share * 2**32 // 100) for share in (MASK_SHARE, RANDOM_SHARE))
    letters = (action - to_mask) * np.uint64(NUM_STANDARD) // (to_random - to_mask)
    shown = np.select(
        [action < to_mask, action < to_random],
        [MASKED, FIRST_RESIDUE + letters.astype(np.int64)],
        residues[places],
    )

    tickets = ((bits.random_raw(len(places)) >> np.uint64(32)) * _UP_TO[-1]) >> np.uint64(32)
    drawn = FIRST_RESIDUE + np.searchsorted(_UP_TO, tickets, side="right")
    for array in (places, shown, drawn):
        array.flags.writeable = False
    return Chosen(places, shown, drawn)


def score_masked(
    log_p_CV: np.ndarray, chosen: Chosen, residues_L: np.ndarray, method: str = ""
) -> np.ndarray:
    """The reading "masked" of one protein, as `requests.Kind` says, [C, 2] fp32.

    Args:
        log_p_CV: log p of every token at each chosen residue, column i for token i.
        residues_L: the protein's true residue ids.
        method: "" or SHUFFLED.
    """
    truth = chosen.truth(residues_L, method)
    log_p = np.take_along_axis(log_p_CV, truth[:, None], 1)[:, 0]
    most = log_p_CV.max(1)
    among = np.maximum((log_p_CV == most[:, None]).sum(1), 1)  # NaN equals nothing
    return np.stack([-log_p, (log_p == most) / among], 1).astype(np.float32)
