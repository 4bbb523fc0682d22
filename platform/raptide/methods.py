"""The choices that calls offer, by name. This module needs no torch: clients only pass them on."""

from typing import Literal

Pooling = Literal["mean", "bos", "residue"]
Long = Literal["error", "window"]
ScoreMethod = Literal["pseudo-ppl", "one-pass"]
VariantMethod = Literal["wt-marginals", "masked-marginals", "pseudo-ppl"]
ScanMethod = Literal["wt-marginals", "masked-marginals"]

MASKED_METHODS = ("pseudo-ppl", "masked-marginals")
"""Those that show a model `<mask>`."""


def blind_to_masks(method: str) -> str:
    """Why a model that is blind to the residue it predicts, an LSTM, refuses one of these."""
    return (
        f"{method} shows a model <mask>, which an LSTM does not read: it is blind to the residue "
        "it predicts already, so take one-pass for sequences and wt-marginals for variants."
    )
