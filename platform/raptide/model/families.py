"""The networks of all families: the one place that makes a model of a shape."""

from __future__ import annotations

import torch

from raptide.model.lstm.config import LstmSettings
from raptide.model.lstm.network import Lstm
from raptide.model.shapes import AnyShape
from raptide.model.transformer import Esm

AnyModel = Esm | Lstm


def make_model(settings: AnyShape, *, with_head: bool = True) -> AnyModel:
    """A model without weights yet."""
    if isinstance(settings, LstmSettings):
        return Lstm(settings, with_head=with_head)
    return Esm(settings, with_head=with_head)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a transformer's parameter of that name is a matrix inside a layer.

    Embeddings and positions have tokens on one side, and the head stands outside.
    """
    return name.startswith("layers.") and parameter.ndim == 2


def count_in_matrices(settings: AnyShape) -> int:
    """Learned numbers in matrices inside layers."""
    with torch.device("meta"):
        named = make_model(settings).named_parameters()
        return sum(each.numel() for name, each in named if is_matrix(name, each))


def count_parameters(settings: AnyShape) -> int:
    """Learned numbers of a model of this shape, without a contact head; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_model(settings).parameters())
