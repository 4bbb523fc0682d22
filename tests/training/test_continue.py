"""A new run that goes on from another's checkpoint, with everything."""

import json
import shutil

import pytest
from lone_worker import run_here
from small_runs import EVERY, as_recipe, checkpoint_of, losses, make_recipe

from raptide.errors import CheckpointError, ConfigError
from raptide.training.trainer import prepare_run


def a_tree(corpus, steps, **sections):
    tree = make_recipe(corpus, steps=steps)
    tree["optimizer"] |= {"decay": "stable", "cooldown": 0.5, "warmup_steps": 2}
    for section, changes in sections.items():
        tree[section] |= changes
    return tree


@pytest.fixture(scope="module")
def short(alone, corpus, tmp_path_factory):
    """A run of twelve steps that cools down after six, and keeps the checkpoint of both ends."""
    folder = tmp_path_factory.mktemp("short") / "run"
    tree = a_tree(corpus, 2 * EVERY, checkpoint={"every_steps": 4, "keep": 1})
    run_here(as_recipe(tree, workers=1), folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(alone, corpus, tmp_path_factory):
    """The losses of a run of four times as many steps."""
    folder = tmp_path_factory.mktemp("long") / "run"
    run_here(as_recipe(a_tree(corpus, 4 * EVERY), workers=1), folder)
    return losses(folder)


def test_the_last_checkpoint_before_the_cool_down_stays(short):
    kept = sorted(path.name for path in (short / "checkpoints").glob("step-*"))
    assert [name.split("-")[1] for name in kept] == ["00000006", "00000012"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_longer_run_goes_on_as_if_it_had_always_been_longer(
    alone, corpus, short, uninterrupted, tmp_path, elsewhere
):
    tree = a_tree(corpus, 4 * EVERY)
    start = short / "checkpoints" / "step-00000006"
    tree["continue_from"] = start.as_uri() if elsewhere else str(start)
    if elsewhere:
        tree["checkpoint"]["storage"] = (tmp_path / "bucket").as_uri()
    recipe, run = as_recipe(tree, workers=1), tmp_path / "longer"
    result = run_here(recipe, run)
    assert result.step == 4 * EVERY
    found = losses(run)
    assert sorted(found) == list(range(7, 4 * EVERY + 1))
    assert found == {step: loss for step, loss in uninterrupted.items() if step > 6}
    resumed = as_recipe(tree | {"training": tree["training"] | {"steps": 25}}, workers=1)
    assert run_here(resumed, run, resume=True).step == 25


def test_a_start_that_was_broken_off_starts_over(alone, corpus, short, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(short, source)
    shutil.rmtree(checkpoint_of(source, 2 * EVERY))
    tree = a_tree(corpus, 2 * EVERY + 1)
    tree["continue_from"] = str(source)
    recipe, run = as_recipe(tree, workers=1), tmp_path / "run"
    prepare_run(recipe, run)
    damaged = next((checkpoint_of(source, 6) / "zero").rglob("*model_states.pt"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="no run with a complete checkpoint"):
        run_here(recipe, run)
    assert not run.exists()
    damaged.write_bytes(whole)
    assert run_here(recipe, run).step == 2 * EVERY + 1
    manifest = json.loads((checkpoint_of(run, 6) / "manifest.json").read_text())
    assert manifest["wandb_run_id"] == json.loads((run / "run.json").read_text())["wandb_run_id"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"seed": 5}}, "was saved with training.seed=1"),
        ({"stream": {"seed": 5}}, "was saved with stream.seed=3"),
        ({"training": {"steps": 6}}, "is of step 6, but training.steps is 6"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(corpus, short, tmp_path, changes, told):
    tree = a_tree(corpus, 4 * EVERY, **changes)
    tree["continue_from"] = str(short / "checkpoints" / "step-00000006")
    with pytest.raises(CheckpointError, match=told):
        prepare_run(as_recipe(tree), tmp_path / "run")


@pytest.mark.parametrize("start", ["runs/none", "{short}/checkpoints/step-00000005", "file:///no"])
def test_a_start_that_is_none_is_named(corpus, short, tmp_path, start):
    tree = a_tree(corpus, 4 * EVERY)
    tree["continue_from"] = start.format(short=short)
    with pytest.raises(CheckpointError, match=r"continue_from: .* is no run with a complete"):
        prepare_run(as_recipe(tree), tmp_path / "run")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("field", ["init_from", "continue_from"])
def test_a_run_is_not_replaced_by_one_that_starts_from_it(
    alone, corpus, short, tmp_path, field, elsewhere
):
    run = tmp_path / "run"
    tree = a_tree(corpus, EVERY)
    if elsewhere:
        tree["checkpoint"]["storage"] = (tmp_path / "bucket").as_uri()
    run_here(as_recipe(tree, workers=1), run)
    saved = max(tmp_path.glob("bucket/*/step-*" if elsewhere else "run/checkpoints/step-*"))
    longer = a_tree(corpus, 2 * EVERY + 1, checkpoint=tree["checkpoint"])
    for start in (run, saved):
        recipe = as_recipe(longer | {field: str(start)}, workers=1)
        with pytest.raises(ConfigError, match=f"{field} lies in .*, which --replace would delete"):
            prepare_run(recipe, run, replace=True)
    prepare_run(as_recipe(longer | {field: str(short)}, workers=1), run, replace=True)


def test_two_starts_are_one_too_many(corpus):
    with pytest.raises(ConfigError, match="are two starts; give one"):
        as_recipe(a_tree(corpus, 6) | {"init_from": "a", "continue_from": "b"})
