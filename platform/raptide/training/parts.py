"""At ZeRO 3, a model that is never whole: made and cut up one layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from raptide.model.config import ModelSettings
from raptide.model.transformer import Esm, draw

Values = Callable[[str, torch.Tensor], torch.Tensor]
"""What a parameter of that name, which has no memory yet, is to be; asked in the order of
`named_parameters`."""


def fresh_values(seed: int) -> Values:
    """Those of `Esm.initialise`."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, parameter: torch.Tensor) -> torch.Tensor:
        drawn = torch.empty(parameter.shape)
        draw(name, drawn, generator)
        return drawn

    return value


@torch.no_grad()
def make_in_parts(
    settings: ModelSettings, values: Values, dtype: torch.dtype, config: dict[str, Any]
) -> Esm:
    """A model with rank 0's values, rounded to `dtype`, of which each rank keeps its part.

    It has no rotary frequencies yet.

    Args:
        config: DeepSpeed's. torch.distributed must be up.
    """
    from deepspeed import zero

    with torch.device("meta"):
        model = Esm(settings)
    for prefix, module in _by_layer(model):
        is_whole = module is model  # its own parameters come first, and are cut up at the end
        for name, parameter in list(module.named_parameters(prefix, recurse=not is_whole)):
            owner, _, last = name.rpartition(".")
            made = torch.nn.Parameter(values(name, parameter).to(dtype))
            setattr(model.get_submodule(owner), last, made)
        if not is_whole:
            zero.Init(module=module, config_dict_or_path=config, mem_efficient_linear=False)
    zero.Init(module=model, config_dict_or_path=config, mem_efficient_linear=False)
    return model


def _by_layer(model: Esm) -> Iterator[tuple[str, torch.nn.Module]]:
    """What is made at once, with its name, in the order of `named_parameters`."""
    yield "", model
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(child))
        else:
            yield name, child
