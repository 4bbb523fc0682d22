"""Study files: the grid, what each run's recipe is, what it costs, and mistakes in a sentence."""

import copy
import re

import pytest
import yaml
from conftest import ROOT

from raptide.errors import ConfigError
from raptide.model.families import count_parameters
from raptide.scaling.cost import cost_of, describe_grid, epoch_tokens, flops_of
from raptide.scaling.study import Study
from raptide.training.planning.resuming import changed_fields

SHIPPED = ROOT / "jobs/recipes/scaling"

RECIPE = {
    "name": "base",
    "corpus": "corpora/x",
    "stream": {"row_tokens": 128, "crop_tokens": 64, "batch_rows": 4, "sampling": "members"},
    "model": {"layers": 1, "width": 16, "heads": 2},
    "training": {"steps": 10, "micro_batch_rows": 2, "precision": "fp32"},
    "cluster": {"workers": 1, "device": "cpu"},
}

STUDY = {
    "name": "small",
    "recipe": "recipe.yaml",
    "settings": {"training": {"steps": 20}},
    "models": {
        "t": {"model": {"layers": 2, "width": 32, "heads": 4}, "optimizer": {"lr": 0.5}},
        "l": {"model": {"family": "lstm", "layers": 1, "width": 8}},
    },
    "data": {"half": {"stream": {"fraction": 0.5}}, "other": {"corpus": "corpora/y"}},
    "grid": [
        {"models": ["t", "l"], "data": ["half", "other"]},
        {"models": ["t"], "data": ["half"], "seeds": [1, 2]},
    ],
}


def load(folder, tree, overrides=()):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return Study.load(folder / "study.yaml", overrides)


def test_a_grid_is_every_model_on_all_data_each_run_once(tmp_path):
    study = load(tmp_path, STUDY)
    assert [run.name for run in study.runs] == [
        "t--half--seed1",
        "t--other--seed1",
        "l--half--seed1",
        "l--other--seed1",
        "t--half--seed2",
    ]
    first, other, lstm, _, again = (run.recipe for run in study.runs)
    assert (first.training.steps, first.optimizer.lr, first.model.width) == (20, 0.5, 32)
    assert (first.stream.fraction, first.stream.sampling) == (0.5, "members")
    assert (other.stream.fraction, other.corpus[0].path) == (1.0, "corpora/y")
    assert (lstm.model.family, lstm.model.width, lstm.optimizer.lr) == ("lstm", 8, 1e-4)
    assert (first.training.seed, first.stream.seed) == (1, 1)
    assert (again.training.seed, again.stream.seed) == (2, 2)
    assert len({run.recipe.name for run in study.runs}) == 5
    assert study.heldout_corpus == "corpora/x"


def test_overrides_reach_every_run_and_spoil_no_other(tmp_path):
    study = load(tmp_path, STUDY, ["training.steps=7", "corpus=/data/z", "stream.seed=9"])
    assert {run.recipe.training.steps for run in study.runs} == {7}
    assert {run.recipe.corpus[0].path for run in study.runs} == {"/data/z"}
    assert [run.recipe.stream.fraction for run in study.runs] == [0.5, 1.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [{"models": ["t", "x"], "data": ["half"]}]}, "names 'x' under models, of which"),
        ({"grid": [{"models": ["t"], "data": ["all"]}]}, "names 'all' under data"),
        ({"models": {"a/b": {}}}, "since folders are called by them, but one is 'a/b'"),
        (
            {"models": {"t": {"model": {"layers": 1}}, "l": {}}},
            "study.yaml, t--half--seed1: the se",
        ),
        ({"settings": {"trainin": {}}}, "no setting `trainin`; did you mean `training`"),
        ({"recipe": "gone.yaml"}, "Cannot read the settings file .*gone.yaml"),
        ({"steps": 3}, "no setting `steps`"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, copy.deepcopy(STUDY) | change)
    assert "\n" not in str(caught.value)


def test_a_run_costs_its_steps_and_its_hours_go_by_speed(tmp_path):
    recipe = load(tmp_path, STUDY).runs[0].recipe
    cost = cost_of(recipe, worker_tflops=1e-3)
    assert cost.tokens == 20 * 4 * 128
    assert cost.parameters == count_parameters(recipe.model)
    assert cost.worker_hours == pytest.approx(cost.flops / 1e9 / 3600)
    assert cost_of(recipe, None).worker_hours is None
    assert cost.epochs is None  # the corpus is not here
    assert cost.flops == flops_of(recipe, cost.tokens) == 20 * flops_of(recipe, 4 * 128)
    # Six operations a parameter of the matrices and token, and attention to 64 tokens.
    matrices, attention = 12 * 2 * 32**2, 2 * 2 * 2 * 32 * 64
    head = (32**2 + 32 * 33) * 0.15
    expected = 6 * (matrices + head) + 3 * attention
    assert cost.flops / cost.tokens == pytest.approx(expected)


def test_epochs_are_counted_where_the_corpus_is_here(tmp_path, corpus):
    study = load(tmp_path, STUDY, [f"corpus={corpus.path}"])
    half, whole = (epoch_tokens(run.recipe) for run in study.runs[:2])
    assert half == pytest.approx(whole / 2)
    cost = cost_of(study.runs[0].recipe, None)
    assert cost.epochs == pytest.approx(20 * 4 * 128 / half)


def test_the_papers_grid_is_complete_and_adds_up():
    study = Study.load(SHIPPED / "paper.yaml")
    names = {run.name.removesuffix("--seed1") for run in study.runs}
    data = ("ur50s", "ur50d", "ur100")
    sizes = {f"esm1-{size}--{name}" for size in ("t6", "t12", "t34") for name in data}
    shares = {f"esm1-t34--{d}" for d in ("ur50s-10pct", "ur50s-1pct", "ur50s-0.1pct", "uniparc")}
    assert names == sizes | shares | {"lstm-small--ur50s", "lstm-large--ur50s"}
    assert {run.recipe.cluster.max_workers for run in study.runs} == {128}
    *lines, total = describe_grid(study.settings, study.runs)
    hours = [float(line.split()[-1].replace(",", "")) for line in lines[1:]]
    told = float(re.search(r"about ([\d,.]+) GPU hours", total)[1].replace(",", ""))
    assert told == pytest.approx(sum(hours), abs=0.05 * len(hours))
    assert told == pytest.approx(sum(run_hours(run) for run in study.runs), rel=1e-3)


def run_hours(run):
    """Of a GPU that keeps up what the study says, for 3 forward passes of all its tokens."""
    recipe = run.recipe
    tokens = recipe.training.steps * recipe.stream.batch_rows * recipe.stream.row_tokens
    return flops_of(recipe, tokens) / 120e12 / 3600


def test_the_miniature_sees_the_smallest_share_often_at_equal_steps():
    study = Study.load(SHIPPED / "miniature.yaml")
    sizes = {count_parameters(run.recipe.model) for run in study.runs}
    assert min(sizes) == pytest.approx(0.2e6, rel=0.1)
    assert max(sizes) == pytest.approx(1.5e6, rel=0.1)
    assert {run.recipe.stream.fraction for run in study.runs} == {0.001, 0.01, 0.05}
    assert len({cost_of(run.recipe, None).tokens for run in study.runs}) == 1
    seeds = {}
    for run in study.runs:
        seeds.setdefault((run.model, run.data), set()).add(run.seed)
    assert sorted(map(len, seeds.values()))[-2:] == [1, 3]
    assert {run.recipe.model.family for run in study.runs} == {"esm2", "lstm"}


@pytest.mark.parametrize(
    ("name", "differ"),
    [
        ("muon", {"optimizer.lr", "optimizer.matrices"}),
        ("averaging", {"optimizer.decay", "optimizer.cooldown", "checkpoint.average_over"}),
    ],
)
def test_what_is_compared_beyond_the_paper_differs_in_what_it_is_about(name, differ):
    study = Study.load(SHIPPED.parent / f"beyond/{name}.yaml")
    first, *others = [run for run in study.runs if "shorter" not in run.name]
    seen = set()
    for run in others:
        seen |= changed_fields(first.recipe, run.recipe).keys()
    assert seen == differ | {"name", "training.seed", "stream.seed"}
