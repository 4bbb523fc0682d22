"""Shapes of the LSTM: the paper's two sizes, and small ones."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from raptide.alphabet import ESM_33, Alphabet
from raptide.config import Settings


def _preset(layers: int, width: int) -> dict[str, Any]:
    return {"family": "lstm", "layers": layers, "width": width}


LSTM_PRESETS: dict[str, dict[str, Any]] = {
    "lstm_l2_300K": _preset(2, 192),
    "lstm_l2_1M": _preset(2, 384),
    "lstm_l3_28M": _preset(3, 1536),
    "lstm_l3_113M": _preset(3, 3072),
}
"""The last two have the sizes of the paper's small and large LSTM."""


class LstmSettings(Settings):
    """The shape of one LSTM."""

    family: Literal["lstm"] = "lstm"
    layers: int = Field(ge=1)

    width: int = Field(ge=2)
    """Of a residue's representation: half of it is the state of either direction."""

    @field_validator("width")
    @classmethod
    def _has_two_halves(cls, width: int) -> int:
        if width % 2:
            raise ValueError("must be even, a half for either direction")
        return width

    @property
    def alphabet(self) -> Alphabet:
        return ESM_33

    @property
    def blind(self) -> bool:
        """It is shown everything, and predicts each residue from those around it alone."""
        return True

    @property
    def rotary(self) -> bool:
        return False

    @property
    def max_tokens(self) -> None:
        """There are no positions that would set a limit."""
        return None

    @property
    def shape(self) -> dict[str, Any]:
        """What two models must share for the weights of one to go into the other."""
        return self.model_dump()

    def forward_flops(self, tokens: float, squared_lengths: float, targets: float) -> float:
        """Operations of a forward pass, as the transformer's are counted (model/config.py).

        Each of the four gates of a direction multiplies its input and its state, both of half the
        width.
        """
        matrices = 2 * self.layers * 2 * 4 * 2 * (self.width // 2) ** 2 * tokens
        return matrices + 2 * self.width * len(self.alphabet) * targets
