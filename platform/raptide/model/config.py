"""Model shapes: the families by name, the switches they stand for, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from raptide.alphabet import ESM_33, ESM_35, Alphabet
from raptide.config import Settings

Family = Literal["esm1", "esm1b", "esm2"]
Positions = Literal["sinusoidal", "learned", "rotary"]


@dataclass(frozen=True)
class FamilyTraits:
    """What sets one family apart; the transformer reads these switches, never the name."""

    alphabet: Alphabet
    positions: Positions
    scale_embedding: bool
    """Embeddings are multiplied by the square root of the width."""
    token_dropout: bool
    norm_before: bool
    norm_after: bool
    tied_head: bool
    """The output projection is the embedding matrix, behind a dense layer and a norm."""
    attention_bias_kv: bool
    """One learned key and value are appended to every sequence."""
    norm_eps: float


TRAITS: dict[str, FamilyTraits] = {
    "esm1": FamilyTraits(ESM_35, "sinusoidal", True, False, False, False, False, True, 1e-12),
    "esm1b": FamilyTraits(ESM_33, "learned", False, True, True, True, True, False, 1e-5),
    "esm2": FamilyTraits(ESM_33, "rotary", False, True, False, True, True, False, 1e-5),
}


def _preset(family: Family, layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"family": family, "layers": layers, "width": width, "heads": heads}


PRESETS: dict[str, dict[str, Any]] = {
    "esm1_t6_43M": _preset("esm1", 6, 768, 12),
    "esm1_t12_85M": _preset("esm1", 12, 768, 12),
    "esm1_t34_670M": _preset("esm1", 34, 1280, 20),
    "esm1b_t33_650M": _preset("esm1b", 33, 1280, 20),
    "esm2_t6_8M": _preset("esm2", 6, 320, 20),
    "esm2_t12_35M": _preset("esm2", 12, 480, 20),
    "esm2_t30_150M": _preset("esm2", 30, 640, 20),
    "esm2_t33_650M": _preset("esm2", 33, 1280, 20),
    "esm2_t36_3B": _preset("esm2", 36, 2560, 40),
    "esm2_t48_15B": _preset("esm2", 48, 5120, 40),
}
"""The published models by the names fair-esm gives them, without the training set."""


class ModelSettings(Settings):
    """The shape of one model: every number, or `preset: NAME` and what differs from it."""

    family: Family = "esm2"
    layers: int = Field(ge=1)
    width: int = Field(ge=2)
    heads: int = Field(ge=1)

    ffn: int | None = Field(None, ge=1)
    """Width of the feed-forward layer; None means four times `width`."""

    norm_eps: float | None = Field(None, gt=0.0)
    """Epsilon of the layer norms; None means the family's own."""

    max_positions: int = Field(1024, ge=4)
    """Rows of the learned position table (ESM-1b), specials included; other families have none."""

    norm_before: bool | None = None
    """Layer norm on the embeddings (ESM-1b only; ESM-1v has none); None means the family's own."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "preset" not in fields:
            return fields
        own = dict(fields)
        name = own.pop("preset")
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, but is {name!r}")
        return PRESETS[name] | own

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSettings:
        if self.width % self.heads or (self.traits.positions == "rotary" and self.head_width % 2):
            raise ValueError(
                f"width ({self.width}) must be an even multiple of heads ({self.heads})"
            )
        return self

    @model_validator(mode="after")
    def _norm_before_is_a_choice_of_esm1b(self) -> ModelSettings:
        if self.norm_before is not None and self.family != "esm1b":
            raise ValueError(f"norm_before can be chosen for esm1b only, not for {self.family}")
        return self

    @property
    def traits(self) -> FamilyTraits:
        traits = TRAITS[self.family]
        if self.norm_before is None:
            return traits
        return replace(traits, norm_before=self.norm_before)

    @property
    def alphabet(self) -> Alphabet:
        return self.traits.alphabet

    @property
    def blind(self) -> bool:
        """Whether a residue is predicted without a look at it, so that nothing is masked."""
        return False

    @property
    def rotary(self) -> bool:
        return self.traits.positions == "rotary"

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def eps(self) -> float:
        return self.norm_eps or self.traits.norm_eps

    @property
    def ffn_width(self) -> int:
        return self.ffn or 4 * self.width

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence the positions allow, specials included; None if they set no limit."""
        return self.max_positions if self.traits.positions == "learned" else None

    @property
    def shape(self) -> dict[str, Any]:
        """What two models must share for the weights of one to go into the other."""
        return {
            "family": self.family,
            "layers": self.layers,
            "width": self.width,
            "heads": self.heads,
            "ffn": self.ffn_width,
            "norm_eps": self.eps,
            "norm_before": self.traits.norm_before,
            "max_positions": self.max_tokens,
        }

    def forward_flops(self, tokens: float, squared_lengths: float, targets: float) -> float:
        """Floating-point operations of a forward pass.

        The layers' matrices for every token, attention within each sequence, the head at the
        targets alone; padding and recomputation do not count. A multiplication and its addition are
        two.

        Args:
            squared_lengths: the sum of the squares of the sequences' tokens.
        """
        matrices = 2 * self.layers * (4 * self.width**2 + 2 * self.width * self.ffn_width) * tokens
        attention = 4 * self.layers * self.width * squared_lengths
        head = 2 * (self.width**2 + self.width * len(self.alphabet)) * targets
        return float(matrices + attention + head)
