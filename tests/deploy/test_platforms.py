"""What starts Ray elsewhere: clusters' files, the image, scripts; checked by whoever reads them."""

import copy
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT
from linters import linted
from ray.autoscaler._private.util import prepare_config, validate_config

from raptide.config import load_settings
from raptide.training.planning.recipe import Recipe

CLUSTERS = ["cluster.yaml", "deploy/cluster-gcp.yaml", "deploy/cluster-onprem.yaml"]
DOCKERFILE = ROOT / "deploy/Dockerfile"
SKYPILOT = yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text())


@pytest.mark.parametrize("file", CLUSTERS)
def test_ray_takes_the_cluster(file):
    config = yaml.safe_load((ROOT / file).read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    for wrong in (
        {"docker": {"imagee": "x"}},
        {"idle_timeout_minutes": "long"},
        {"auth": {"user": "x"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(copy.deepcopy(config) | wrong))


@pytest.mark.parametrize("file", CLUSTERS)
def test_a_cluster_takes_its_environment_from_the_image_and_asks_for_a_token(file):
    config = prepare_config(yaml.safe_load((ROOT / file).read_text()))
    assert config["docker"]["image"] == "REGISTRY/raptide:0.1.0-cuda"
    assert not config["setup_commands"] + config["head_setup_commands"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert list(config["file_mounts"]) == ["/home/ray/.ray/auth_token"]
    for role in ("head", "worker"):
        command = config[f"{role}_start_ray_commands"][-1]
        assert "--metrics-export-port=8080" in command
        assert "dashboard-host=0.0.0.0" not in command


def test_the_image_is_clean():
    assert linted("hadolint", DOCKERFILE) == ""
    broken = DOCKERFILE.read_text().replace("USER 1000", "RUN sudo cd /tmp")
    assert "DL3004" in linted("hadolint", "-", text=broken)


def stages():
    """The instructions of each stage of the image, by its name."""
    found = {}
    for line in re.sub(r"\\\n\s*", "", DOCKERFILE.read_text()).splitlines():
        if line.startswith("FROM"):
            found[line.split()[-1]] = []
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def test_the_image_is_of_pinned_versions_and_runs_as_nobody_in_particular():
    found = stages()
    assert list(found) == ["base", "cpu", "cuda"]
    assert any(line.startswith("HEALTHCHECK") for line in found["base"])
    for target in ("cpu", "cuda"):
        installs = [line for line in found[target] if "pip install" in line]
        assert all("--constraint constraints.txt --editable" in line for line in installs)
        assert found[target][-1] == "USER 1000"
    major, minor, _ = re.search(
        r"FROM python:(\d+)\.(\d+)\.(\d+)-", DOCKERFILE.read_text()
    ).groups()
    assert (int(major), int(minor)) >= (3, 11)


def test_the_image_holds_what_runs_and_nothing_else():
    lines = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert kept == {
        *("pyproject.toml", "constraints.txt", "README.md"),
        *("platform", "jobs", "serve", "deploy"),
    }
    assert all((ROOT / each).exists() for each in kept)


def test_the_scripts_are_clean():
    assert linted("shellcheck", ROOT / "deploy/slurm.sh") == ""
    for part in ("setup", "run"):
        assert linted("shellcheck", "--shell=bash", "-", text=SKYPILOT[part]) == ""
    assert "SC2086" in linted("shellcheck", "--shell=bash", "-", text="rm $1\n")


def test_skypilot_runs_the_job_that_the_job_itself_takes():
    envs, script = SKYPILOT["envs"], SKYPILOT["run"]
    assert "jobs/pretrain_model.py" in script
    assert "--start-or-resume" in script
    recipe = load_settings(Recipe, ROOT / envs["RECIPE"], shlex.split(envs["OVERRIDES"]))
    (gpus,) = SKYPILOT["resources"]["accelerators"].values()
    assert recipe.cluster.max_workers == SKYPILOT["num_nodes"] * gpus
    assert (recipe.cluster.device, Path(envs["RUN"]).parts[1]) == ("cuda", "shared")
