"""Recipes of the smallest engines that hold every family's kinds of tensors."""

from small_runs import as_recipe

TREE = {
    "name": "x",
    "corpus": "none",
    "stream": {"row_tokens": 64, "crop_tokens": 64, "batch_rows": 2},
    "training": {"steps": 2, "micro_batch_rows": 1, "zero3_keep_whole_below": 0},
    "cluster": {"workers": 1, "device": "cpu"},
}
SHAPES = {
    "esm1": {"family": "esm1", "layers": 3, "width": 32, "heads": 4},
    "esm1b": {"family": "esm1b", "layers": 2, "width": 32, "heads": 4, "max_positions": 64},
    "esm2": {"family": "esm2", "layers": 4, "width": 32, "heads": 4},
}


def recipe_of(zero_stage, precision="fp32", **fields):
    training = TREE["training"] | {"zero_stage": zero_stage, "precision": precision}
    return as_recipe(TREE | fields | {"training": training})
