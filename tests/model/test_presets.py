import subprocess
import sys

import pytest

from raptide.config import parse_settings
from raptide.errors import ConfigError
from raptide.model.config import PRESETS, ModelSettings
from raptide.model.families import count_parameters
from raptide.model.shapes import ALL_PRESETS

PUBLISHED = {  # millions, as the names and the paper give them
    "esm1_t6_43M": 43,
    "esm1_t12_85M": 85,
    "esm1_t34_670M": 670,
    "esm1b_t33_650M": 650,
    "esm2_t6_8M": 8,
    "esm2_t12_35M": 34,
    "esm2_t30_150M": 148,
    "esm2_t33_650M": 651,
    "esm2_t36_3B": 2840,
    "esm2_t48_15B": 15_130,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    settings = ModelSettings.model_validate({"preset": name})
    assert count_parameters(settings) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.07)
    assert settings.model_dump().keys() == ModelSettings.model_fields.keys()


def test_a_preset_can_be_changed_and_a_wrong_one_is_named():
    settings = ModelSettings.model_validate({"preset": "esm2_t6_8M", "layers": 3})
    assert (settings.layers, settings.width) == (3, 320)
    with pytest.raises(ConfigError, match=r"one of esm1_t6_43M, .* but is 'esm3'"):
        parse_settings(ModelSettings, {"preset": "esm3"}, source="recipe.yaml")
    tree = {"preset": "esm2_t6_8M", "norm_before": True}
    with pytest.raises(ConfigError, match="norm_before can be chosen for esm1b only"):
        parse_settings(ModelSettings, tree, source="recipe.yaml")


def test_the_table_lists_every_preset():
    command = [sys.executable, "-m", "raptide.model"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()[1:15]] == list(ALL_PRESETS)
    assert "651,042,593      2.60      1.30" in shown
