"""Which runs of a study train when, with Ray's part played: no run really trains here."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from raptide.config import parse_settings
from raptide.errors import CorpusError
from raptide.scaling import training
from raptide.scaling.study import PlannedRun
from raptide.scaling.training import slots, train_all
from raptide.training.planning.recipe import Recipe
from raptide.training.planning.room import Nodes, Room

TREE = {
    "name": "x",
    "corpus": "none",
    "model": {"layers": 1, "width": 16, "heads": 2},
    "training": {"steps": 1, "micro_batch_rows": 1},
    "cluster": {"workers": 2, "device": "cpu"},
}


def a_run(name, workers=2):
    recipe = parse_settings(Recipe, TREE | {"cluster": {"workers": workers}}, source="x")
    return PlannedRun(name, "d", 1, recipe)


@pytest.fixture
def played(monkeypatch):
    """What goes on; tasks end in the order in which they were started."""
    seen = SimpleNamespace(going=[], most=0, started=[], cancelled=[], finished=set(), broken={})

    def start(recipe, folder):
        name = Path(folder).name
        seen.started.append(name)
        seen.going.append(name)
        seen.most = max(seen.most, len(seen.going))
        return name

    def wait(tasks, **options):
        assert set(tasks) == set(seen.going)
        return seen.going[:1], seen.going[1:]

    def get(task):
        seen.going.remove(task)
        if task in seen.broken:
            raise seen.broken[task]

    def standing(folder, recipe):
        return "finished" if folder.name in seen.finished else "saved"

    monkeypatch.setattr(training, "train_one", SimpleNamespace(remote=start))
    monkeypatch.setattr(training, "standing_of_run", standing)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", lambda task, force: seen.cancelled.append(task))
    return seen


def names(*letters):
    return [f"{letter}--d--seed1" for letter in letters]


def test_as_many_train_as_may_and_what_is_finished_does_not(played, tmp_path):
    played.finished |= set(names("b"))
    runs = [a_run(letter) for letter in "abcde"]
    endings = list(train_all(runs, tmp_path, 2, lambda line: None))
    assert sorted(ending.run.name for ending in endings) == names(*"abcde")
    assert played.started == names(*"acde")
    assert played.most == 2
    assert not played.cancelled
    assert [ending.folder for ending in endings if ending.run.model == "c"] == [
        tmp_path / "c--d--seed1"
    ]


def test_a_run_that_fails_is_told_of_and_the_others_go_on(played, tmp_path):
    played.broken = {"b--d--seed1": CorpusError("b holds no finished corpus")}
    runs = [a_run(letter) for letter in "abc"]
    endings = {e.run.model: e.problem for e in train_all(runs, tmp_path, 1, lambda line: None)}
    assert endings == {"a": "", "b": "b holds no finished corpus", "c": ""}


def test_who_stops_early_leaves_no_run_behind(played, tmp_path):
    runs = [a_run(letter) for letter in "abc"]
    with closing(train_all(runs, tmp_path, 2, lambda line: None)) as endings:
        first = next(endings)
    assert first.run.model == "a"
    assert played.cancelled == names("b")
    assert played.started == names("a", "b")


@pytest.mark.parametrize(("cpus", "fitting"), [(4, 1), (6, 2), (9, 3), (2, 1)])
def test_runs_have_room_beside_the_data_tasks(cpus, fitting):
    nodes = (Nodes(1, {"CPU": float(cpus)}),)
    room = Room("here", nodes, nodes)
    assert slots([a_run("a"), a_run("b", workers=1)], "cpu", room) == fitting
