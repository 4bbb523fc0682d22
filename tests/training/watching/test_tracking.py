import json

import pytest

from raptide.training.planning.recipe import TrackingSettings
from raptide.training.watching.tracking import Tracker, resolve_mode


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_auto_is_offline_without_a_key_and_online_with_one(no_key, monkeypatch, tmp_path):
    auto = TrackingSettings()
    assert resolve_mode(auto) == "offline"
    login = "machine api.wandb.ai\n  login user\n  password secret\n"
    (tmp_path / ".netrc").write_text(login)
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_mode(auto) == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert resolve_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode(auto) == "offline"
    assert resolve_mode(TrackingSettings(mode="disabled")) == "disabled"


def test_disabled_writes_the_plain_copy_alone(tmp_path):
    settings = TrackingSettings(mode="disabled")
    with Tracker(settings, tmp_path, mode="disabled", run_id="x", name="x", config={}) as tracker:
        tracker.log(3, {"train/loss": 2.5})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"trainer/global_step": 3, "train/loss": 2.5}
