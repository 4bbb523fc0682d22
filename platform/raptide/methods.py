"""The choices that calls offer, by name. This module needs no torch: clients only pass them on."""

from typing import Literal

Pooling = Literal["mean", "bos", "residue"]
Long = Literal["error", "window"]
ScoreMethod = Literal["pseudo-ppl", "one-pass"]
VariantMethod = Literal["wt-marginals", "masked-marginals", "pseudo-ppl"]
ScanMethod = Literal["wt-marginals", "masked-marginals"]
