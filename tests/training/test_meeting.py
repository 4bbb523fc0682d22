"""More ranks than Ray lets meet by itself."""

from types import SimpleNamespace

import pytest
import ray

from raptide.training.meeting import RoomForAll, SynchronizationActor

RANKS = 1024


@pytest.fixture
def options(monkeypatch):
    """Of the actor, which are put back."""
    monkeypatch.setattr(SynchronizationActor, "_default_options", {"num_cpus": 0})
    return SynchronizationActor._default_options


def test_1024_ranks_meet(cluster, options):
    RoomForAll().before_worker_group_start(SimpleNamespace(num_workers=RANKS))
    node = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    actor = SynchronizationActor.options(label_selector=node).remote(timeout_s=60)  # as Ray does
    calls = [
        actor.broadcast_from_rank_zero.remote(rank, RANKS, None if rank else "all", "test")
        for rank in range(RANKS)
    ]
    try:
        assert set(ray.get(calls, timeout=90)) == {"all"}
    finally:
        ray.kill(actor)


def test_ray_train_keeps_no_list_of_checkpoints(whole):
    """It would be written once after every save, and a storage that stumbles then ended the run."""
    names = {path.name for path in (whole.folder / "checkpoints").iterdir()}
    assert any(name.startswith("step-") for name in names)
    assert "checkpoint_manager_snapshot.json" not in names


def test_ray_train_starts_nothing_for_datasets_that_no_run_has(whole):
    started = {each["ActorClassName"] for each in ray._private.state.actors().values()}
    assert "TrainController" in started, "runs of this session are not seen"
    assert "DatasetManager" not in started
