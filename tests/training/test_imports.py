"""What trains and answers on a machine that has torch, and neither Ray nor what reads corpora."""

import subprocess
import sys

import pytest

HEAVY = ("ray", "pyarrow", "deepspeed")

LIGHT = (
    "raptide.inference.engine",
    "raptide.model.formats.detect",
    "raptide.training.batches",
    "raptide.training.planning.deepspeed_config",
    "raptide.training.planning.estimate",
    "raptide.training.planning.recipe",
    "raptide.training.step",
)


@pytest.fixture(scope="module")
def failures():
    """Of each module that cannot be imported without the heavy ones, why; from one process."""
    script = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({HEAVY!r}))  # an import of these raises
for module in {LIGHT!r}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(module, error, sep="\\t")
"""
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(line.split("\t") for line in output.splitlines())


@pytest.mark.parametrize("module", LIGHT)
def test_a_step_a_model_an_engine_and_the_estimate_need_no_ray_no_arrow_no_deepspeed(
    failures, module
):
    assert failures.get(module) is None
