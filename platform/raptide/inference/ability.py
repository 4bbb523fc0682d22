"""What a model cannot do is said before anything is computed."""

from __future__ import annotations

from raptide.errors import BundleError
from raptide.methods import MASKED_METHODS, blind_to_masks
from raptide.model.families import AnyModel


def refuse_likelihoods(model: AnyModel, method: str) -> None:
    """Raises BundleError where a model gives none, or none by this method."""
    if not model.has_head:
        raise BundleError(
            "This model has no language-model head, so it gives embeddings but no likelihoods; "
            "load the masked language model it was made from (EsmForMaskedLM)."
        )
    if model.settings.blind and method in MASKED_METHODS:
        raise BundleError(blind_to_masks(method))


def refuse_maps(model: AnyModel) -> None:
    """Raises BundleError where a model has no attention maps."""
    if model.settings.blind:
        raise BundleError(
            "An LSTM has no attention maps to read contacts off; it gives embeddings, logits, "
            "and scores of one pass."
        )
