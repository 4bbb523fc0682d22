"""A model's tensors, free of any file format: checked on the way in, named on the way out.

named = bundle.read_bundle(folder)     # a file's own names
weights = place_tensors(named)                 # every tensor in its place, each exactly once
model = weights.build()
named = name_tensors(weights, "fair_esm")      # and the same way back
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from raptide.errors import BundleError
from raptide.model.config import ModelSettings
from raptide.model.contacts import ContactHead
from raptide.model.families import AnyModel, make_model
from raptide.model.formats.names import CONTACT_HEAD, INV_FREQ, TIED_HEAD, Named, tensor_names
from raptide.model.shapes import AnyShape
from raptide.model.transformer import Esm, rotary_frequencies


@dataclass(frozen=True)
class Weights:
    """One model: its shape and everything that was learned."""

    settings: AnyShape

    state: Mapping[str, torch.Tensor]
    """The tensors of the model's `state_dict()`, under their names there."""

    inv_freq: torch.Tensor | None = None
    """Rotary frequencies [K / 2] fp32, if the file held them; None means computed ones."""

    contact_head: ContactHead | None = None

    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from; plain JSON values."""

    left_out: tuple[str, ...] = ()
    """Tensors of the file that are no part of the language model, such as a classifier's."""

    @classmethod
    def of(cls, model: AnyModel) -> Weights:
        """What a model in memory holds; nothing is copied."""
        return cls(model.settings, model.state_dict(), model.frequencies(), model.contact_head)

    @property
    def has_head(self) -> bool:
        """Whether there is a language-model head; encoders and classifiers have none."""
        return "head_bias" in self.state

    def refuse_headless(self, source: object) -> None:
        """Training starts from masked language models.

        Raises:
            BundleError: the one in `source` has no language-model head.
        """
        if not self.has_head:
            raise BundleError(
                f"{source} has no language-model head, which training needs; start from the masked "
                "language model it was made from (EsmForMaskedLM)."
            )

    def build(self) -> AnyModel:
        """The model around these very tensors, in evaluation mode."""
        with torch.device("meta"):
            model = make_model(self.settings, with_head=self.has_head)
        model.load_state_dict(self.state, assign=True)
        if isinstance(model, Esm):
            if self.settings.rotary:
                model.inv_freq = self.frequencies()
            model.contact_head = self.contact_head
        return model.eval()

    def frequencies(self) -> torch.Tensor:
        """The rotary frequencies in use, [K / 2] fp32."""
        if self.inv_freq is not None:
            return self.inv_freq
        assert isinstance(self.settings, ModelSettings)
        return rotary_frequencies(self.settings.head_width)


def place_tensors(named: Named) -> Weights:
    """Give each tensor of a file its place, each exactly once.

    A language-model head is whole or not there at all.

    Raises:
        BundleError: a tensor is missing, unused, of another shape, or contradicts another.
    """
    settings, column, source = named.settings, named.column, named.source
    left = dict(named.tensors)
    inv_freq = _take_inv_freq(settings, left, column, source)
    contact_head = _take_contact_head(settings, left, column, source)
    names = tensor_names(settings, column)
    head = {TIED_HEAD.get(column), *(names[name] for name in names if name.startswith("head_"))}
    with torch.device("meta"):
        expected = make_model(settings, with_head=not head.isdisjoint(left)).state_dict()
    state = {n: _take(left, names[n], t.shape, source) for n, t in expected.items()}
    tied = left.pop(TIED_HEAD.get(column, ""), None) if _is_tied(settings) else None
    if tied is not None and not torch.equal(tied, state["embed.weight"]):
        raise BundleError(
            f"{source}: {TIED_HEAD[column]} differs from the embedding it is tied to; no model of "
            "the family has an output projection of its own beside it."
        )
    if left:
        raise BundleError(f"{source} holds {min(left)}, which a model of its shape has no use for.")
    return Weights(settings, state, inv_freq, contact_head, named.lineage, named.left_out)


def _is_tied(settings: AnyShape) -> bool:
    return isinstance(settings, ModelSettings) and settings.traits.tied_head


def _take(
    left: dict[str, torch.Tensor], name: str, shape: torch.Size, source: object
) -> torch.Tensor:
    if name not in left:
        raise BundleError(f"{source} lacks the tensor {name}, which a model of its shape needs.")
    tensor = left.pop(name)
    if tensor.shape == (1, 1, *shape):  # as fair-esm keeps ESM-1's bias_k and bias_v
        tensor = tensor.reshape(shape)
    if tensor.shape != shape:
        raise BundleError(
            f"{source}: {name} has shape {tuple(tensor.shape)}, but a model of its shape needs "
            f"{tuple(shape)}."
        )
    return tensor


def _take_inv_freq(
    settings: AnyShape, left: dict[str, torch.Tensor], column: str, source: object
) -> torch.Tensor | None:
    """The rotary frequencies, which every layer repeats (transformers 5 writes `*` for it)."""
    if not isinstance(settings, ModelSettings):
        return None
    if not settings.rotary or column not in INV_FREQ:
        return None
    found = None
    for layer in ("*", *range(settings.layers)):
        name = INV_FREQ[column].format(layer=layer)
        if name not in left:
            continue
        tensor = _take(left, name, torch.Size([settings.head_width // 2]), source).float()
        if not torch.isfinite(tensor).all():
            raise BundleError(
                f"{source}: {name} holds values that are no numbers; take another one."
            )
        if found is not None and not torch.equal(found, tensor):
            raise BundleError(f"{source}: {name} differs from that of the layers before it.")
        found = tensor
    return found


def _take_contact_head(
    settings: AnyShape, left: dict[str, torch.Tensor], column: str, source: object
) -> ContactHead | None:
    names = [f"{CONTACT_HEAD[column]}.{kind}" for kind in ("weight", "bias")]
    if not isinstance(settings, ModelSettings) or not any(name in left for name in names):
        return None
    shapes = torch.Size([1, settings.layers * settings.heads]), torch.Size([1])
    return ContactHead(
        *(_take(left, name, shape, source) for name, shape in zip(names, shapes, strict=True))
    )


def name_tensors(weights: Weights, column: str) -> Named:
    """The tensors under a format's names, for writing; the inverse of `place_tensors`."""
    names = tensor_names(weights.settings, column)
    tensors = {names[name]: tensor for name, tensor in weights.state.items()}
    tensors |= name_beside(weights, column)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return Named(weights.settings, tensors, column, lineage=weights.lineage)


def name_beside(weights: Weights, column: str) -> dict[str, torch.Tensor]:
    """What a file holds besides the model's own state, under a format's names.

    Computed rotary frequencies are written out too: other readers expect them in the file.
    """
    settings, tensors = weights.settings, {}
    if settings.rotary and column in INV_FREQ:
        for layer in range(settings.layers):
            tensors[INV_FREQ[column].format(layer=layer)] = weights.frequencies().clone()
    if weights.contact_head is not None:
        tensors[CONTACT_HEAD[column] + ".weight"] = weights.contact_head.weight
        tensors[CONTACT_HEAD[column] + ".bias"] = weights.contact_head.bias
    return tensors
