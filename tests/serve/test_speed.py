from types import SimpleNamespace

from serve import metrics
from serve.metrics import SPEED_S, Speed


def test_a_pace_is_of_the_last_half_minute_alone(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    speed = Speed()
    assert speed.per_s == 0
    for when in (100.2, 100.7, 110.0):
        clock.now = when
        speed.add(300)
    assert speed.per_s == 900 / SPEED_S
    assert len(speed._done) == 2, "one number a second is kept"
    clock.now = 135.0
    assert speed.per_s == 300 / SPEED_S
    clock.now = 145.0
    assert speed.per_s == 0
