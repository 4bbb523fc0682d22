"""Bundles of means: which weights, in which parts, and the same whatever happens to the run."""

import copy
import errno
import shutil
from dataclasses import replace

import pytest
import torch
from draws import random_weights
from lone_worker import run_here
from small_engines import SHAPES, recipe_of
from small_runs import as_recipe, checkpoint_of, evaluations, losses, make_recipe

from raptide.errors import CheckpointError, ConfigError, RaptideError
from raptide.model.families import count_parameters
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.tensor_files import digest_weights
from raptide.model.packed import Packed
from raptide.training.checkpoints import step_bundle
from raptide.training.checkpoints.checkpoint import SavedCheckpoint
from raptide.training.checkpoints.export import read_average, read_zero_weights
from raptide.training.checkpoints.keeping import amend_manifest
from raptide.training.checkpoints.owned import Storage
from raptide.training.checkpoints.running_mean import AVERAGED, RunningMean
from raptide.training.checkpoints.step_bundle import StepBundle
from raptide.training.engine import build_engine
from raptide.training.planning.estimate import DTYPES
from raptide.training.planning.overview import describe_run
from raptide.training.trainer import prepare_run
from raptide.training.watching.heldout import HeldoutEvaluator, heldout_rows

OVER = 3
CPU = torch.device("cpu")
EVERY_TWO = {"checkpoint": {"every_steps": 2, "keep": 10, "average_over": OVER}}
BESIDE = {"evaluation": {"every_steps": 4, "asynchronous": True}}


def parts_of(number):
    """What each of so many checkpoints has in the mean, by going back from the newest."""
    parts, rest = [], 1.0
    for n in range(number, 0, -1):
        parts.append(rest / min(n, OVER))
        rest -= parts[-1]
    return parts[::-1]


def mean_of(states):
    return {
        name: sum(
            part * state[name].double()
            for part, state in zip(parts_of(len(states)), states, strict=True)
        )
        for name in states[0]
    }


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor, rtol=0, atol=1e-6), name


def test_the_first_have_equal_parts_and_each_later_one_a_part_in_so_many():
    assert parts_of(3) == pytest.approx([1 / 3] * 3)
    assert parts_of(5) == pytest.approx([4 / 27] * 3 + [2 / 9, 1 / 3])


@pytest.mark.parametrize("family", ["esm1b", "lstm"])
def test_what_comes_out_of_turn_has_no_part(on_cpu, tmp_path, monkeypatch, family):
    shape = SHAPES.get(family, {"family": "lstm", "layers": 1, "width": 16})
    recipe = recipe_of(0, model=shape, **EVERY_TWO, **BESIDE)
    engine = build_engine(recipe, 1, "cpu", None)
    names = [name for name, _ in engine.module.named_parameters()]
    mean, taken = RunningMean(recipe, tmp_path / "mean"), []
    found = {}
    for step in (1, 2, 4, 5, 6, 8, 10):
        drawn = {name: torch.randn_like(engine.module.get_parameter(name)) for name in names}
        monkeypatch.setattr(step_bundle, "full_tensors", lambda *_, drawn=drawn: drawn.items())
        bundle = StepBundle(recipe, {"step": step, "inv_freq": None}, mean)
        folder = tmp_path / f"{step}"
        bundle.gather(engine, folder, shard_bytes=2000)
        bundle.finish()
        found[step] = read_weights(folder)
        if step % 2 == 0:
            taken.append(drawn)
        assert_near(found[step].state, mean_of(taken or [drawn]))
        assert found[step].lineage.get(AVERAGED, 0) == len(taken)
        shutil.rmtree(folder)  # once it has been sent
    assert AVERAGED not in found[1].lineage, "there is no mean before the first in turn"
    assert digest_weights(tmp_path / "mean")


def test_what_could_not_be_written_has_no_part(on_cpu, tmp_path, monkeypatch):
    recipe = recipe_of(0, model=SHAPES["esm1b"], **EVERY_TWO, **BESIDE)
    engine = build_engine(recipe, 1, "cpu", None)
    mean = RunningMean(recipe, tmp_path / "mean")
    for step in (2, 4):
        bundle = StepBundle(recipe, {"step": step, "inv_freq": None}, mean)
        bundle.gather(engine, tmp_path / "model")
        if step == 4:
            monkeypatch.setattr("raptide.model.formats.tensor_files.save_file", refuse)
            with pytest.raises(OSError, match="no room"):
                bundle.finish()
        else:
            bundle.finish()
    monkeypatch.undo()
    bundle.gather(engine, tmp_path / "model")
    bundle.finish()
    assert read_weights(tmp_path / "model").lineage[AVERAGED] == 2


def refuse(*_, **__):
    raise OSError("no room")


def every_two(steps, corpus):
    tree = make_recipe(corpus, steps=steps) | copy.deepcopy(EVERY_TWO)
    return tree | {"evaluation": tree["evaluation"] | BESIDE["evaluation"]}


def test_a_run_s_bundles_are_means_and_a_resume_goes_on_with_them(alone, corpus, tmp_path):
    tree, run = every_two(9, corpus), tmp_path / "run"
    recipe = as_recipe(tree, workers=1)
    whole = run_here(recipe, run)
    steps = (2, 4, 6, 8, 9)
    states = [read_zero_weights(checkpoint_of(run, step)).state for step in steps]
    for count, step in enumerate(steps, start=1):
        bundle = read_weights(checkpoint_of(run, step) / "model")
        assert bundle.lineage[AVERAGED] == count
        assert_near(bundle.state, mean_of(states[:count]))

    found = evaluations(run)
    assert sorted(found) == [4, 8, 9], "beside the training, and the last one by the workers"
    plan = prepare_run(recipe, tmp_path / "unused")
    for step, numbers in found.items():
        expected = ece_of(checkpoint_of(run, step) / "model", plan, recipe)
        assert numbers["eval/ece"] == pytest.approx(expected, rel=1e-5)
    assert whole.heldout_ece.all_chosen == found[9]["eval/ece"]

    curve, digests = losses(run), [digest_weights(bundle_of(run, step)) for step in (6, 8, 9)]
    for step in (6, 8, 9):
        shutil.rmtree(checkpoint_of(run, step))
    (run / "result.json").unlink()
    resumed = run_here(recipe, run, resume=True)
    assert resumed.audit.redone_steps == 5
    assert losses(run) == curve, "what trains is not the mean"
    assert [digest_weights(bundle_of(run, step)) for step in (6, 8, 9)] == digests
    assert resumed.heldout_ece == whole.heldout_ece

    # Without means, and with nothing left to do but the last evaluation.
    amend_manifest(Storage.of_run(run), checkpoint_of(run, 9).name, {"heldout_step": 8})
    (run / "result.json").unlink()
    tree["checkpoint"]["average_over"] = None
    assert run_here(as_recipe(tree, workers=1), run, resume=True).heldout_ece == whole.heldout_ece
    with pytest.raises(CheckpointError, match="are means of several checkpoints already"):
        read_average(run, 2)


def bundle_of(run, step):
    return checkpoint_of(run, step) / "model"


def ece_of(bundle, plan, recipe):
    rows = heldout_rows(plan, recipe.evaluation)
    evaluator = HeldoutEvaluator(rows, plan, recipe.training.micro_batch_rows)
    return evaluator.measure(read_weights(bundle).build(), CPU).ece.all_chosen


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
)
def test_an_engine_evaluates_the_mean(on_cpu, tmp_path, stage, precision):
    recipe = recipe_of(stage, precision, model=SHAPES["esm2"], **EVERY_TWO, **BESIDE)
    engine, mean = build_engine(recipe, 1, "cpu", None), RunningMean(recipe, tmp_path / "mean")
    tokens = torch.randint(4, 24, (30,))
    before = answer(engine, tokens)
    mean.put_into(engine)
    assert torch.equal(answer(engine, tokens), before), "there is none yet"

    weights = replace(random_weights(**SHAPES["esm2"]), lineage={AVERAGED: 1})
    write_weights(tmp_path / "model", weights)
    mean.begin(2)
    mean.keep(tmp_path / "model")
    mean.put_into(engine)
    model = read_weights(tmp_path / "model").build().to(DTYPES[precision])
    model.inv_freq = engine.module.frequencies()
    assert torch.equal(answer(engine, tokens), answer(model, tokens))
    assert not torch.equal(answer(engine, tokens), before)


def answer(model, tokens):
    model.eval()
    with torch.no_grad():
        return model(Packed(tokens, (len(tokens),)))


def test_a_mean_is_taken_up_whatever_may_be_done_to_its_folder(on_cpu, tmp_path):
    recipe = recipe_of(0, model=SHAPES["esm2"], **EVERY_TWO, **BESIDE)
    weights = replace(random_weights(**SHAPES["esm2"]), lineage={AVERAGED: 2})
    storage, name = Storage.of(tmp_path), "step-00000004-000001-0"
    write_weights(tmp_path / name / "model", weights)
    files = {f"model/{file.name}": "" for file in (tmp_path / name / "model").iterdir()}
    saved = SavedCheckpoint(storage, name, {"files": files})
    for folder in (tmp_path / name, tmp_path / name / "model"):
        folder.chmod(0o500)
    (tmp_path / "scratch").mkdir()
    mean = RunningMean(recipe, tmp_path / "scratch/mean")
    parameters = count_parameters(recipe.model)
    assert mean.bytes_to_come == 4 * parameters
    mean.take_up(saved)
    assert mean.bytes_to_come == 0
    assert (tmp_path / "scratch/mean").stat().st_mode & 0o200
    mean.begin(6)
    name, before = next(iter(weights.state.items()))
    assert torch.allclose(mean.mixed(name, before + 3), before + 1), "a third"


def test_a_mean_that_has_no_room_is_told(on_cpu, tmp_path, monkeypatch):
    recipe = recipe_of(0, model=SHAPES["esm2"], **EVERY_TWO, **BESIDE)
    weights = replace(random_weights(**SHAPES["esm2"]), lineage={AVERAGED: 2})
    write_weights(tmp_path / "step/model", weights)
    files = {f"model/{file.name}": "" for file in (tmp_path / "step/model").iterdir()}
    saved = SavedCheckpoint(Storage.of(tmp_path), "step", {"files": files})
    (tmp_path / "scratch").mkdir()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(RaptideError, match=r"mean .* in step cannot be copied to .*No space left"):
        RunningMean(recipe, tmp_path / "scratch/mean").take_up(saved)


def test_a_dry_run_says_what_bundles_hold(corpus, tmp_path):
    recipe = as_recipe(every_two(4, corpus), workers=1)
    told = describe_run(recipe, prepare_run(recipe, tmp_path / "run"))
    expected = (
        "with a bundle of the mean over about 3 of them, the newest 10 kept, in the run folder"
    )
    assert expected in told


def test_means_need_what_evaluates_them(corpus):
    tree = every_two(4, corpus)
    tree["evaluation"]["asynchronous"] = False
    with pytest.raises(
        ConfigError, match=r"average_over is for bundles.*evaluation.asynchronous: true"
    ):
        as_recipe(tree)
    tree = every_two(4, corpus)
    tree["checkpoint"]["bundle_every"] = 2
    with pytest.raises(ConfigError, match="needs bundle_every: 1"):
        as_recipe(tree)
