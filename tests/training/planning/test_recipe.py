import math
import re

import pytest
from conftest import ROOT
from deepspeed.runtime.config import DeepSpeedConfig

from raptide.config import load_settings, parse_settings
from raptide.errors import ConfigError
from raptide.training.planning.deepspeed_config import deepspeed_config
from raptide.training.planning.estimate import worker_memory
from raptide.training.planning.optimizer import OptimizerSettings, learning_rate
from raptide.training.planning.recipe import Recipe

RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))
RECIPES.append(ROOT / "jobs/recipes/beyond/record.yaml")  # others there are studies


class DataParallel:
    """The part of Megatron's `mpu` that DeepSpeed asks for the number of workers."""

    def __init__(self, workers):
        self.get_data_parallel_world_size = lambda: workers


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_deepspeed_takes_its_configuration(path, monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    recipe = load_settings(Recipe, path)
    workers = recipe.cluster.max_workers
    config = deepspeed_config(recipe, workers=workers, device="cuda")
    parsed = DeepSpeedConfig(config, mpu=DataParallel(workers))
    assert parsed.zero_optimization_stage == recipe.training.zero_stage
    assert parsed.train_batch_size == recipe.stream.batch_rows
    assert parsed.gradient_accumulation_steps == recipe.accumulation(workers)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_memory_that_a_recipe_states_is_the_estimate(path):
    stated = re.search(r"about ([\d.]+)\s+GB a GPU", path.read_text().replace("\n#", ""))
    recipe = load_settings(Recipe, path)
    if recipe.cluster.device != "cuda":
        assert stated is None
        return
    estimate = worker_memory(recipe, recipe.cluster.max_workers).total / 1e9
    assert float(stated[1]) == pytest.approx(estimate, rel=0.1)


def test_deepspeed_gets_what_keeps_gpus_busy(monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    recipe = load_settings(Recipe, ROOT / "jobs/recipes/esm2_t33_650m.yaml")
    workers = recipe.cluster.max_workers
    config = deepspeed_config(recipe, workers=workers, device="cuda")
    parsed = DeepSpeedConfig(config, mpu=DataParallel(workers))
    assert parsed.zero_config.reduce_bucket_size == 50_000_000
    assert parsed.zero_config.overlap_comm
    assert not parsed.timers_config.enabled, "it would wait for the GPU twice a micro-batch"
    assert config["optimizer"]["params"]["torch_adam"], "DeepSpeed's own needs nvcc"
    assert config["optimizer"]["params"]["fused"]
    on_cpus = deepspeed_config(recipe, workers=workers, device="cpu")["zero_optimization"]
    assert not on_cpus["overlap_comm"]


def test_the_papers_batch_is_131072_tokens_on_128_gpus():
    for name in ("esm1_t34_ur50s", "esm1b_t33_650m"):
        recipe = load_settings(Recipe, ROOT / f"jobs/recipes/{name}.yaml")
        assert recipe.stream.batch_rows * recipe.stream.row_tokens == 131_072
        assert recipe.cluster.max_workers == 128


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.zero_stage=4", "zero_stage"),
        ("stream.crop_tokens=4096", "crop_tokens .4096. must be at most row_tokens"),
        ("stream.first_batch_rows=2", "say together how batches grow; give both"),
        ("stream.batch_warmup_steps=9", "say together how batches grow; give both"),
        (
            "stream.first_batch_rows=9 stream.batch_warmup_steps=9",
            r"first_batch_rows .9. must be at most batch_rows .8.",
        ),
        ("training.offload_parameters=true", "offload_parameters needs zero_stage 3"),
        ("training.compile=true training.zero_stage=3", "compile needs zero_stage 0, 1 or 2"),
        ("training.rotary_base=500 model.family=esm1b", "rotary_base is of esm2"),
        ("training.rotary_base=500 init_from=x", "of fresh weights, and init_from brings"),
        ("model.heads=7", "must be an even multiple of heads"),
        ("model.layer=3", "did you mean `layers`"),
    ],
)
def test_a_bad_setting_is_one_sentence(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(Recipe, ROOT / "jobs/recipes/demo.yaml", override.split())
    assert "\n" not in str(caught.value)


def test_esm1b_refuses_crops_beyond_its_positions():
    tree = load_settings(Recipe, ROOT / "jobs/recipes/esm1b_t33_650m.yaml").model_dump()
    tree["model"]["max_positions"] = 512
    with pytest.raises(ConfigError, match=r"max_positions .512."):
        parse_settings(Recipe, tree, source="x")


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 128, 200])
def test_any_number_of_workers_finds_slots_for_all_rows(workers):
    recipe = load_settings(Recipe, ROOT / "jobs/recipes/esm1b_t33_650m.yaml")
    assert workers * recipe.training.micro_batch_rows * recipe.accumulation(workers) >= 128


def test_the_rate_warms_up_and_decays_as_the_inverse_square_root():
    settings = OptimizerSettings(lr=1e-3, warmup_steps=100)
    assert learning_rate(settings, 1, 500) == pytest.approx(1e-5)
    assert learning_rate(settings, 100, 500) == pytest.approx(1e-3)
    assert learning_rate(settings, 400, 500) == pytest.approx(1e-3 / math.sqrt(4))
    linear = settings.model_copy(update={"decay": "linear"})
    rates = [learning_rate(linear, step, 1000) for step in (50, 100, 500, 900, 1000)]
    assert rates == pytest.approx([5e-4, 1e-3, 5.5e-4, 1e-4, 1e-4])


def test_a_stable_rate_is_level_until_the_cool_down():
    settings = OptimizerSettings(lr=1e-3, warmup_steps=100, decay="stable", cooldown=0.2)
    rates = [learning_rate(settings, step, 1000) for step in (50, 100, 800, 900, 1000)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3 * 101 / 201, 1e-3 / 201])
    longer = [learning_rate(settings, step, 5000) for step in (50, 800, 4000)]
    assert longer == pytest.approx([5e-4, 1e-3, 1e-3]), "the same as far as both are level"
    never = settings.model_copy(update={"cooldown": 0.0})
    assert learning_rate(never, 1000, 1000) == 1e-3
    short = learning_rate(settings, 110, 110)
    assert short == pytest.approx(1e-3 / 11), "a warm-up is never cut"


def test_workers_are_a_number_or_two_in_an_override_too():
    demo = ROOT / "jobs/recipes/demo.yaml"
    for text, workers in (("3", (3, 3)), ("[1, 4]", (1, 4))):
        assert load_settings(Recipe, demo, [f"cluster.workers={text}"]).cluster.workers == workers


def test_a_benchmark_needs_evaluation_beside_the_training():
    tree = {"name": "x", "corpus": "c", "evaluation": {"benchmark": "b.yaml"}}
    tree |= {"stream": {"batch_rows": 2}, "training": {"steps": 1, "micro_batch_rows": 1}}
    tree |= {"model": {"layers": 1, "width": 8, "heads": 2}, "cluster": {"workers": 1}}
    with pytest.raises(ConfigError, match="benchmark needs asynchronous: true"):
        parse_settings(Recipe, tree, source="test")
    tree["evaluation"]["asynchronous"] = True
    assert parse_settings(Recipe, tree, source="test").evaluation.benchmark == "b.yaml"
