import hashlib

import numpy as np
import pyarrow as pa
import pytest

from raptide.alphabet import ESM_33, ESM_35
from raptide.data.corpus import ClusterRows
from raptide.data.streaming.batch import RowSettings
from raptide.data.streaming.rows import block_order, draw_members, pack_block
from raptide.errors import ConfigError


def make_block(lengths_by_cluster, seed=0):
    """A block of clusters of random members with the given lengths."""
    rng = np.random.default_rng(seed)
    lengths = [length for members in lengths_by_cluster for length in members]
    return ClusterRows(
        clusters=pa.array([f"c{i}" for i in range(len(lengths_by_cluster))]),
        cluster_size=np.array([len(m) for m in lengths_by_cluster]),
        first_member=np.zeros(len(lengths_by_cluster), np.int64),
        member_splits=np.cumsum([0, *map(len, lengths_by_cluster)]),
        residue_splits=np.cumsum([0, *lengths]),
        residues=rng.integers(4, 24, sum(lengths)).astype(np.uint8),
    )


@pytest.fixture(scope="module")
def block():
    rng = np.random.default_rng(1)
    return make_block([[int(n)] for n in rng.lognormal(5.6, 0.7, 600) + 5])


SETTINGS = RowSettings(row_tokens=1024, crop_tokens=512)


def true_tokens(rows):
    """What the tokens were before masking."""
    return np.where(rows.targets == ESM_33.pad, rows.tokens, rows.targets)


def segments_of(rows):
    for tokens, lengths in zip(true_tokens(rows), rows.segments, strict=True):
        ends = np.cumsum(lengths)
        assert (tokens[ends[-1] :] == ESM_33.pad).all()
        yield from np.split(tokens[: ends[-1]], ends[:-1])


def test_every_sequence_appears_once_whole_or_as_one_crop(block):
    rows = pack_block(block, SETTINGS, ESM_33, 1, 0, 0)
    whole = {
        block.residues[a:b].tobytes()
        for a, b in zip(block.residue_splits, block.residue_splits[1:], strict=False)
    }
    crops = 0
    for segment in segments_of(rows):
        inner = segment[(segment != ESM_33.cls) & (segment != ESM_33.eos)].tobytes()
        if segment[0] == ESM_33.cls and segment[-1] == ESM_33.eos:
            whole.remove(inner)
        else:
            crops += 1
            assert len(segment) == SETTINGS.crop_tokens
            source = next(w for w in whole if inner in w)
            assert segment[0] != ESM_33.cls or source.startswith(inner)
            assert segment[-1] != ESM_33.eos or source.endswith(inner)
            whole.remove(source)
    assert not whole
    assert crops > 10


def test_rows_depend_on_seed_epoch_and_block_and_on_nothing_else(block):
    def digest(*key):
        rows = pack_block(block, SETTINGS, ESM_33, *key)
        return hashlib.sha256(rows.tokens.tobytes() + rows.targets.tobytes()).hexdigest()

    assert digest(1, 0, 0) == digest(1, 0, 0)
    assert len({digest(1, 0, 0), digest(2, 0, 0), digest(1, 1, 0), digest(1, 0, 1)}) == 4


def test_the_stream_is_the_same_as_ever():
    """A golden hash: another numpy, machine or refactoring must not change a single token."""
    rows = pack_block(make_block([[30], [700], [61], [5]], 3), SETTINGS, ESM_33, 11, 2, 5)
    assert hashlib.sha256(rows.tokens.tobytes() + rows.targets.tobytes()).hexdigest() == GOLDEN


GOLDEN = "d2792272522c56f651feb048465cefe6a41d80ce350656bf99fcdad9859dd3df"


def test_masking_follows_the_recipe(block):
    rows = pack_block(block, SETTINGS, ESM_33, 1, 0, 0)
    true = true_tokens(rows)
    residues = (true >= 4) & (true < 31)
    chosen = rows.targets != ESM_33.pad
    assert not (chosen & ~residues).any(), "a special was chosen"
    n, p = residues.sum(), 0.15
    assert abs(chosen.sum() - n * p) < 5 * np.sqrt(n * p * (1 - p))
    shown = rows.tokens[chosen]
    m = len(shown)
    masked = (shown == ESM_33.mask).sum()
    kept = (shown == rows.targets[chosen]).sum()
    assert abs(masked - 0.8 * m) < 5 * np.sqrt(m * 0.16)
    assert abs(kept - (0.1 + 0.1 / 20) * m) < 5 * np.sqrt(m * 0.1)
    letters = shown[(shown != ESM_33.mask) & (shown != rows.targets[chosen])]
    counts = np.bincount(letters, minlength=24)[4:24]
    assert counts.sum() == len(letters), "a random residue is one of the 20 standard ones"
    assert counts.min() > 0.5 * counts.mean()


def test_packing_wastes_little(block):
    wide = RowSettings(row_tokens=4096, crop_tokens=1024)
    rows = pack_block(block, wide, ESM_33, 1, 0, 0)
    assert (rows.tokens != ESM_33.pad).mean() > 0.95


def test_esm1_gets_no_eos(block):
    rows = pack_block(block, SETTINGS, ESM_35, 1, 0, 0)
    assert not (rows.tokens == ESM_35.eos).any()
    assert (rows.tokens == ESM_35.cls).any()


def test_members_are_drawn_one_per_cluster_and_evenly():
    block = make_block([[10] * 4 for _ in range(200)])
    counts = np.zeros(4)
    for epoch in range(50):
        drawn = draw_members(block, "members", 1, epoch)
        assert (drawn // 4 == np.arange(200)).all()
        counts += np.bincount(drawn % 4, minlength=4)
    chi_square = ((counts - 2500) ** 2 / 2500).sum()
    assert chi_square < 16.3  # 99.9% of 3 degrees of freedom


def test_only_the_row_that_holds_the_drawn_member_emits_it():
    whole = make_block([[10] * 6])
    first = make_block([[10] * 4])
    second = make_block([[10] * 2])
    size = np.array([6])
    first = ClusterRows(**{**vars(first), "cluster_size": size})
    second = ClusterRows(**{**vars(second), "cluster_size": size, "first_member": np.array([4])})
    for epoch in range(30):
        member = draw_members(whole, "members", 1, epoch)[0]
        parts = [draw_members(part, "members", 1, epoch) for part in (first, second)]
        assert [len(p) for p in parts] == ([1, 0] if member < 4 else [0, 1])
        assert sum(map(int, parts[0])) + sum(4 + int(i) for i in parts[1]) == member
    assert draw_members(second, "representatives", 1, 0).size == 0
    assert draw_members(second, "all", 1, 0).tolist() == [0, 1]


def test_a_block_without_members_gives_no_rows():
    block = make_block([[10]])
    block = ClusterRows(**{**vars(block), "first_member": np.array([4])})
    assert pack_block(block, SETTINGS, ESM_33, 1, 0, 0).tokens.shape == (0, 1024)


def test_each_epoch_reads_every_block_in_another_order():
    orders = [block_order(1, epoch, 50).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_a_crop_longer_than_a_row_is_refused():
    from raptide.config import parse_settings

    with pytest.raises(ConfigError, match=r"crop_tokens .2048. must be at most row_tokens"):
        parse_settings(RowSettings, {"crop_tokens": 2048}, source="x")
