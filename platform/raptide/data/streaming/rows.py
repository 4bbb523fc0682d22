"""One block to packed rows: draw members, permute, crop, pack, mask.

Everything is a function of (settings, seed, epoch, block). The random bits are raw Philox output
(Salmon et al., SC 2011: key the seed, counter the place), used in integer arithmetic alone, so the
same rows come out on any machine and any numpy.

Shapes: R packed rows of `row_tokens` tokens; a segment is one sequence or crop within a row.
"""

from __future__ import annotations

import bisect
import hashlib

import numpy as np

from raptide.alphabet import FIRST_RESIDUE, NUM_STANDARD, RESIDUES, Alphabet
from raptide.data.corpus import ClusterRows
from raptide.data.streaming.batch import PackedRows, RowSettings, Sampling

BLOCK_ORDER, BLOCK_ROWS = 0, 1
"""What a Philox counter is used for: its last word."""

MASK_SHARE, RANDOM_SHARE = 80, 90
"""Percent of the chosen residues up to which `<mask>`, then a random residue, takes their place."""


def philox(seed: int, epoch: int, block: int, purpose: int) -> np.random.Philox:
    """The bit generator of one place in the stream."""
    return np.random.Philox(key=[seed, 0], counter=[0, epoch, block, purpose])


def block_order(seed: int, epoch: int, num_blocks: int) -> np.ndarray:
    """The order in which an epoch reads its blocks, [num_blocks] int64."""
    return np.argsort(philox(seed, epoch, 0, BLOCK_ORDER).random_raw(num_blocks), kind="stable")


def draw_members(block: ClusterRows, sampling: Sampling, seed: int, epoch: int) -> np.ndarray:
    """Indices of the members that a block contributes to an epoch, int64."""
    if sampling == "all":
        return np.arange(len(block.residue_splits) - 1)
    if sampling == "representatives":
        return block.member_splits[:-1][block.first_member == 0]
    key = f"{seed} {epoch} ".encode()
    digests = b"".join(
        hashlib.blake2b(key + name.encode(), digest_size=8, person=b"raptide.member").digest()
        for name in block.clusters.to_pylist()
    )
    drawn = (np.frombuffer(digests, "<u8") % block.cluster_size.astype(np.uint64)).astype(np.int64)
    within = drawn - block.first_member
    held = (within >= 0) & (within < np.diff(block.member_splits))
    return (block.member_splits[:-1] + within)[held]


def pack_block(
    block: ClusterRows, settings: RowSettings, alphabet: Alphabet, seed: int, epoch: int, index: int
) -> PackedRows:
    """The packed rows of block `index` in `epoch`; `index` is its place in the corpus."""
    members = draw_members(block, settings.sampling, seed, epoch)
    bits = philox(seed, epoch, index, BLOCK_ROWS)
    members = members[np.argsort(bits.random_raw(len(members)), kind="stable")]
    start, length, has_cls, has_eos = _crop(block, members, settings, alphabet, bits)

    tokens_of = length + has_cls + has_eos
    row, column, num_rows = _best_fit(tokens_of, settings.row_tokens)
    shuffled = np.argsort(bits.random_raw(num_rows), kind="stable")
    row = np.argsort(shuffled)[row]

    tokens = np.full(num_rows * settings.row_tokens, alphabet.pad, np.uint8)
    target = row * settings.row_tokens + column
    tokens[target[has_cls]] = alphabet.cls
    tokens[(target + tokens_of - 1)[has_eos]] = alphabet.eos
    before = np.cumsum(length) - length
    offset = np.arange(length.sum()) - np.repeat(before, length)
    source = np.repeat(block.residue_splits[members] + start, length) + offset
    tokens[np.repeat(target + has_cls, length) + offset] = block.residues[source]

    targets = _mask(tokens, settings.mask_fraction, alphabet, bits)
    shape = (num_rows, settings.row_tokens)
    in_row_order = np.lexsort((column, row))
    segments = np.split(
        tokens_of[in_row_order].astype(np.int32),
        np.cumsum(np.bincount(row, minlength=num_rows))[:-1],
    )
    return PackedRows(tokens.reshape(shape), targets.reshape(shape), segments if num_rows else [])


def _crop(
    block: ClusterRows,
    members: np.ndarray,
    settings: RowSettings,
    alphabet: Alphabet,
    bits: np.random.Philox,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where each sequence is cut: first residue, residues kept, and which true ends it touches.

    The window slides over the sequence with its specials, so `<cls>` and `<eos>` stay only where
    the crop touches the true end.
    """
    residues = np.diff(block.residue_splits)[members]
    full = residues + alphabet.num_specials
    kept = np.minimum(full, settings.crop_tokens)
    high = bits.random_raw(len(members)) >> np.uint64(32)
    choices = (full - kept + 1).astype(np.uint64)
    start = ((high * choices) >> np.uint64(32)).astype(np.int64)
    has_cls = start == 0
    has_eos = (start + kept == full) & alphabet.append_eos
    return np.maximum(start - 1, 0), kept - has_cls - has_eos, has_cls, has_eos


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit decreasing: each piece goes into the fullest row that still holds it.

    Returns each piece's row and column, [n] int64, and the number of rows.
    """
    row = np.zeros(len(sizes), np.int64)
    column = np.zeros(len(sizes), np.int64)
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    num_rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        place = bisect.bisect_left(open_rows, (size, 0))
        if place < len(open_rows):
            free, index = open_rows.pop(place)
        else:
            free, index = capacity, num_rows
            num_rows += 1
        row[piece], column[piece] = index, capacity - free
        if free > size:
            bisect.insort(open_rows, (free - size, index))
    return row, column, num_rows


def _mask(
    tokens: np.ndarray, fraction: float, alphabet: Alphabet, bits: np.random.Philox
) -> np.ndarray:
    """Choose residues, replace them in `tokens` in place, and return the targets.

    One 64-bit draw a token: the low half chooses it, the high half says what takes its place.
    """
    raw = bits.random_raw(len(tokens))
    is_residue = (tokens >= FIRST_RESIDUE) & (tokens < FIRST_RESIDUE + len(RESIDUES))
    chosen = np.flatnonzero(((raw & 0xFFFFFFFF) < int(fraction * 2**32)) & is_residue)
    targets = np.full_like(tokens, alphabet.pad)
    targets[chosen] = tokens[chosen]

    action = raw[chosen] >> np.uint64(32)
    to_mask = np.uint64(MASK_SHARE * 2**32 // 100)
    to_random = np.uint64(RANDOM_SHARE * 2**32 // 100)
    tokens[chosen[action < to_mask]] = alphabet.mask
    randomised = (action >= to_mask) & (action < to_random)
    letter = (action[randomised] - to_mask) * np.uint64(NUM_STANDARD) // (to_random - to_mask)
    tokens[chosen[randomised]] = FIRST_RESIDUE + letter.astype(np.uint8)
    return targets
