from types import SimpleNamespace

from serve import metrics
from serve.metrics import PACE_S, Pace


def test_a_pace_is_of_the_last_half_minute_alone(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    pace = Pace()
    assert pace.per_s == 0
    for when in (100.2, 100.7, 110.0):
        clock.now = when
        pace.add(300)
    assert pace.per_s == 900 / PACE_S
    assert len(pace._done) == 2, "one number a second is kept"
    clock.now = 135.0
    assert pace.per_s == 300 / PACE_S
    clock.now = 145.0
    assert pace.per_s == 0
