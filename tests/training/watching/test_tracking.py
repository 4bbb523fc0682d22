import json
from types import SimpleNamespace

import pytest
import wandb
from offline_wandb import read_runs

from raptide.training.checkpoints.checkpoint import SavedCheckpoint
from raptide.training.checkpoints.owned import Storage
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


@pytest.fixture
def tracker(tmp_path):
    """Opens a tracker in `tmp_path`; returns it and what it warned of."""

    def track(mode):
        warnings = []
        options = {"run_id": "abc", "name": "x", "config": {}, "warn": warnings.append}
        return Tracker(TrackingSettings(mode=mode), tmp_path, mode=mode, **options), warnings

    yield track
    wandb.teardown()  # its service runs beside this process


def written(folder):
    """What W&B has written, once its service has ended."""
    wandb.teardown()
    return [run for run in read_runs(folder / "wandb") if run[0]]


def test_a_run_goes_on_offline_where_wandb_cannot_be_reached(tracker, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    opened, (warning,) = tracker("online")
    with opened:
        opened.log(1, {"train/loss": 2.5})
    assert warning.startswith("W&B cannot be reached (")
    assert "the run goes on offline: `wandb sync` sends it later" in warning
    ((run_id, _, history, _),) = written(tmp_path)
    assert (run_id, [row["train/loss"] for row in history]) == ("abc", [2.5])


@pytest.mark.parametrize(
    ("kind", "uri"),
    [
        ("gcs", "gs://b/runs/x/model"),
        ("s3", "s3://b/runs/x/model"),
        ("abfs", "abfs://b/runs/x/model"),
    ],
)
def test_wandb_is_told_where_a_model_lies_in_any_storage(tracker, tmp_path, kind, uri):
    storage = Storage(SimpleNamespace(type_name=kind), "b/runs")
    opened, warnings = tracker("offline")
    with opened:
        opened.link("model", "abc", f"{SavedCheckpoint(storage, 'x', {}).uri}/model", step=3)
    ((*_, artifacts),) = written(tmp_path)
    assert artifacts == [("model", "model-abc", [uri])]
    assert warnings == []


def test_nothing_that_wandb_does_at_the_end_ends_a_run(tracker, tmp_path):
    kept, warnings = tracker("offline")
    with kept:
        kept.log(1, {"train/loss": 2.5})
        kept._wandb = SimpleNamespace(log=kept._wandb.log, finish=fail_to_finish)
    assert warnings == ["W&B did not take the end of the run (its service has died)."]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 2.5


def fail_to_finish(exit_code):
    raise RuntimeError("its service has died")
