from serve.calls import cut


def test_runs_hold_about_a_batch_and_miss_nothing():
    costs = [5, 5, 5, 30, 1, 1, 8, 3]
    runs = list(cut(costs, 10))
    assert [costs[run] for run in runs] == [[5, 5], [5], [30], [1, 1, 8], [3]]
    assert list(cut([], 10)) == []
