import numpy as np
import pytest
import torch

from raptide.alphabet import ESM_33
from raptide.data.streaming.batch import PackedRows
from raptide.training.batches import micro_batches, share_bounds


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_rows", [1, 2, 5])
def test_shares_cover_each_row_once_with_equally_many_micro_batches(workers, micro_rows):
    accumulation = -(-10 // (workers * micro_rows))
    shares = [share_bounds(10, rank, workers, micro_rows, accumulation) for rank in range(workers)]
    assert {len(share) for share in shares} == {accumulation}
    rows = [row for share in shares for first, last in share for row in range(first, last)]
    assert rows == list(range(10))


def test_micro_batches_hold_the_filled_tokens_and_their_targets():
    tokens = np.array([[0, 5, 32, 2, 1, 1], [0, 7, 2, 0, 8, 2]], np.uint8)
    targets = np.array([[1, 1, 6, 1, 1, 1], [1, 7, 1, 1, 1, 1]], np.uint8)
    segments = [np.array([4], np.int32), np.array([3, 3], np.int32)]
    rows = PackedRows(tokens, targets, segments)
    both, empty = micro_batches(rows, [(0, 2), (2, 2)], ESM_33, torch.device("cpu"))
    assert both.packed.tokens_T.tolist() == [0, 5, 32, 2, 0, 7, 2, 0, 8, 2]
    assert both.packed.lengths == (4, 3, 3)
    assert both.targets.at_N.tolist() == [2, 5]
    assert both.targets.true_N.tolist() == [6, 7]
    assert empty.packed.lengths == (2,)
    assert empty.targets.at_N.shape == empty.targets.true_N.shape == (0,)
