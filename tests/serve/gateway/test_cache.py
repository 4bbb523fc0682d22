import numpy as np

from serve.calls import Ask, Done, cut
from serve.gateway.cache import Cache, cache_key


def done(floats):
    return Done([np.zeros(floats, np.float32)], "w", 1, 0.0, 0.0)


def test_the_least_recently_used_goes_first_and_memory_is_bounded():
    cache = Cache(10_000)
    for name in (b"a", b"b", b"c", b"d"):
        cache.put(name, done(500))
    assert cache.get(b"a") is not None
    cache.put(b"e", done(500))
    assert cache.get(b"b") is None
    assert all(cache.get(name) is not None for name in (b"a", b"c", b"d", b"e"))
    assert cache.held_bytes <= 10_000


def test_what_is_too_large_is_not_kept():
    cache = Cache(10_000)
    cache.put(b"a", done(1000))
    assert cache.get(b"a") is None
    assert cache.held_bytes == 0


def test_everything_an_answer_depends_on_is_in_its_key():
    base = ("m", "w", Ask("embed"), "MK", [])
    others = [
        ("n", "w", Ask("embed"), "MK", []),
        ("m", "v", Ask("embed"), "MK", []),
        ("m", "w", Ask("embed", layers=(0,)), "MK", []),
        ("m", "w", Ask("embed", pooling="bos"), "MK", []),
        ("m", "w", Ask("logits"), "MK", []),
        ("m", "w", Ask("embed"), "MKT", []),
        ("m", "w", Ask("variants", method="wt-marginals"), "MK", ["K2A"]),
    ]
    keys = {cache_key(*each) for each in [base, *others]}
    assert len(keys) == 1 + len(others)
    assert cache_key(*base) == cache_key(*base)


def test_runs_hold_about_a_batch_and_miss_nothing():
    costs = [5, 5, 5, 30, 1, 1, 8, 3]
    runs = list(cut(costs, 10))
    assert [costs[run] for run in runs] == [[5, 5], [5], [30], [1, 1, 8], [3]]
    assert list(cut([], 10)) == []
