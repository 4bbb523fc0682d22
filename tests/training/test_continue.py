"""A new run that goes on from another's checkpoint, with everything."""

import errno
import itertools
import json
import os
import shutil
from unittest import mock

import pytest
from lone_worker import LoneTrainer, run_here
from small_runs import EVERY, as_recipe, checkpoint_of, losses, make_recipe
from stumbles import hurry

from raptide.errors import CheckpointError, ConfigError, RaptideError
from raptide.training import trainer
from raptide.training.checkpoints import adopting
from raptide.training.checkpoints.checkpoint import newest_checkpoint
from raptide.training.checkpoints.owned import Storage
from raptide.training.run_folder import begin_run, standing_of_run
from raptide.training.trainer import prepare_run, pretrain
from raptide.training.watching.heldout import heldout_rows, unigram_ece


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


def test_a_run_that_has_cooled_down_is_gone_on_with_from_before(short, tmp_path):
    """From its end the rate would jump."""
    assert adopting.find_checkpoint(str(short)).step == EVERY
    end = max(path.name for path in (short / "checkpoints").glob("step-*"))
    assert adopting.find_checkpoint(str(short / "checkpoints" / end)).step == 2 * EVERY
    shutil.copytree(short / "checkpoints" / end, tmp_path / "alone" / end)
    with pytest.raises(CheckpointError, match=r"cooled down since step 6, and keeps no checkpoint"):
        adopting.find_checkpoint(str(tmp_path / "alone"))


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_start_that_was_broken_off_starts_over(
    alone, corpus, short, tmp_path, monkeypatch, number
):
    hurry(monkeypatch)
    tree = a_tree(corpus, 2 * EVERY + 1)
    tree["continue_from"] = str(short)
    recipe, run = as_recipe(tree, workers=1), tmp_path / "run"
    plan, copied = prepare_run(recipe, run), []

    def fails(source, sink):
        copied.append(sink.write(source.read(10)))
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(adopting, "copy_stream", fails)
        with pytest.raises(RaptideError, match="give the command again, with --start-or-resume"):
            pretrain(recipe, plan, run)
    assert copied
    assert standing_of_run(run, recipe) == "begun"
    assert newest_checkpoint(Storage.of_run(run)) is None
    with mock.patch.object(trainer, "TorchTrainer", LoneTrainer):
        assert pretrain(recipe, prepare_run(recipe, run, begun=True), run).step == 2 * EVERY + 1
    manifest = json.loads((run / "checkpoints/step-00000006/manifest.json").read_text())
    assert manifest["wandb_run_id"] == json.loads((run / "run.json").read_text())["wandb_run_id"]


def test_a_copy_that_is_damaged_is_not_replaced_by_fresh_weights(alone, corpus, short, tmp_path):
    tree = a_tree(corpus, 2 * EVERY + 1, checkpoint={"every_steps": 100})
    recipe, run = as_recipe(tree | {"continue_from": str(short)}, workers=1), tmp_path / "run"
    plan = prepare_run(recipe, run)
    begin_run(run, recipe, unigram_ece(plan, heldout_rows(plan, recipe.evaluation)))
    saved = adopting.find_checkpoint(str(short))
    adopting.adopt(saved, Storage.of_run(run), recipe, "abc")
    damaged = next((run / "checkpoints/step-00000006/zero").rglob("*model_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with (
        mock.patch.object(trainer, "TorchTrainer", LoneTrainer),
        pytest.raises(CheckpointError, match="is damaged; start over with --replace"),
    ):
        pretrain(recipe, plan, run)


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


@pytest.mark.parametrize(
    ("start", "told"),
    [
        ("runs/none", "holds no complete checkpoint"),
        ("file:///no", "holds no complete checkpoint"),
        ("{short}/checkpoints/step-00000005", "is no complete checkpoint .it has no manifest.json"),
    ],
)
def test_a_start_that_is_none_is_named(corpus, short, tmp_path, start, told):
    tree = a_tree(corpus, 4 * EVERY)
    tree["continue_from"] = start.format(short=short)
    with pytest.raises(CheckpointError, match=f"continue_from: .* {told}"):
        prepare_run(as_recipe(tree), tmp_path / "run")


def test_a_start_that_is_damaged_is_called_that(corpus, short, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(short, source)
    damaged = next((checkpoint_of(source, 6) / "zero").rglob("*model_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    tree = a_tree(corpus, 4 * EVERY)
    tree["continue_from"] = str(source / "checkpoints/step-00000006")
    with pytest.raises(CheckpointError, match=r"model_states.pt is damaged \(sha256"):
        prepare_run(as_recipe(tree), tmp_path / "run")


def test_a_folder_of_checkpoints_is_a_start_too(short):
    folder = short / "checkpoints"
    for start in (str(folder), folder.as_uri()):
        assert adopting.find_checkpoint(start).step == EVERY


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_is_not_replaced_by_one_that_starts_from_it(
    alone, corpus, short, tmp_path, elsewhere
):
    run = tmp_path / "run"
    tree = a_tree(corpus, EVERY)
    if elsewhere:
        tree["checkpoint"]["storage"] = (tmp_path / "bucket").as_uri()
    run_here(as_recipe(tree, workers=1), run)
    saved = max(tmp_path.glob("bucket/*/step-*" if elsewhere else "run/checkpoints/step-*"))
    longer = a_tree(corpus, 2 * EVERY + 1, checkpoint=tree["checkpoint"])
    for field, start in itertools.product(("init_from", "continue_from"), (run, saved)):
        recipe = as_recipe(longer | {field: str(start)}, workers=1)
        with pytest.raises(ConfigError, match=f"{field} lies in .*, which --replace would delete"):
            prepare_run(recipe, run, replace=True)
    for field in ("init_from", "continue_from"):
        prepare_run(as_recipe(longer | {field: str(short)}, workers=1), run, replace=True)


def test_a_link_to_the_storage_is_not_replaced_either(alone, corpus, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tree = a_tree(corpus, EVERY)
    tree["checkpoint"]["storage"] = (tmp_path / "link").as_uri()
    run_here(as_recipe(tree, workers=1), tmp_path / "run")
    (saved,) = (tmp_path / "real").glob("*/step-00000006*")
    tree["training"]["steps"] += 1
    recipe = as_recipe(tree | {"continue_from": str(saved)})
    with pytest.raises(ConfigError, match="which --replace would delete"):
        prepare_run(recipe, tmp_path / "run", replace=True)


def test_a_run_that_is_made_longer_keeps_what_was_level(alone, corpus, tmp_path):
    tree = a_tree(corpus, 2 * EVERY, checkpoint={"every_steps": 4, "keep": 1})
    run_here(as_recipe(tree, workers=1), tmp_path / "run")
    tree["training"]["steps"] = 5 * EVERY
    run_here(as_recipe(tree, workers=1), tmp_path / "run", resume=True)
    kept = sorted(path.name.split("-")[1] for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept == ["00000006", "00000015", "00000030"]


def test_two_starts_are_one_too_many(corpus):
    with pytest.raises(ConfigError, match="are two starts; give one"):
        as_recipe(a_tree(corpus, 6) | {"init_from": "a", "continue_from": "b"})
