"""Random inputs that can be drawn again: every test draws from a generator of its own.

It is seeded by the session's seed, which pytest prints in its header, and the test's name:
`RAPTIDE_TEST_SEED=123 pytest tests/x.py::test_y` repeats what that test drew.
"""

import os
import secrets
import zlib
from dataclasses import replace

import numpy as np
import torch

from raptide.model.config import ModelSettings
from raptide.model.contacts import ContactHead
from raptide.model.formats.weights import Weights
from raptide.model.packed import Packed
from raptide.model.transformer import Esm

SEED = int(os.environ.get("RAPTIDE_TEST_SEED") or secrets.randbelow(2**31))
os.environ["RAPTIDE_TEST_SEED"] = str(SEED)  # the processes that share the suite draw alike
LETTERS = "LAGVSERTIDPKQNFYMHWC"

_generator = np.random.default_rng(SEED)


def seed_for(test):
    """Start the draws of one test; torch's too."""
    global _generator
    _generator = np.random.default_rng([SEED, zlib.crc32(test.encode())])
    torch.manual_seed(int(_generator.integers(2**31)))


def generator():
    return _generator


def random_sequence(length):
    return "".join(_generator.choice(list(LETTERS), length))


def random_weights(**shape):
    model = Esm(ModelSettings(**shape)).initialise(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that differences show
    heads = shape["layers"] * shape["heads"]
    head = ContactHead(3 * torch.randn(1, heads), torch.zeros(1))
    return replace(Weights.of(model), contact_head=head, lineage={"step": 1})


def random_tokens(alphabet, lengths=(5, 77, 30, 3, 128), seed=None):
    """Fresh random sequences with masks inside, specials around."""
    rng = _generator if seed is None else np.random.default_rng(seed)
    pieces = []
    for length in lengths:
        residues = rng.integers(4, 29, length - alphabet.num_specials)
        residues[rng.random(len(residues)) < 0.15] = alphabet.mask
        pieces.append(torch.from_numpy(alphabet.add_specials(residues).astype(np.int64)))
    return pieces


def pad(pieces):
    """[n, longest] tokens padded with <pad>."""
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=1)


def pack(pieces):
    return Packed(torch.cat(pieces), tuple(map(len, pieces)))
