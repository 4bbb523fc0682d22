"""A known sequence's answer, written beside the weights and asked for again before they serve.

    check.json    sequence, the dtype it was computed in, mean embedding of the last layer [D], mean
                  log likelihood of its residues (one pass, nothing masked; null without a
                  language-model head)

Weights that were swapped, cut off or damaged on the way answer otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raptide.alphabet import encode_residues
from raptide.errors import BundleError
from raptide.model.families import AnyModel
from raptide.model.packed import Packed
from raptide.patience import patiently, unreadable

CHECK = "check.json"

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGDNPCWXBUZOLIEVQAPILSRVGDGTQDNLSGAEKAVQVKV"
"""Every residue letter occurs, so that every row of the embedding counts."""

TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (5e-3, 0.1)}
"""How far embedding (relative to its norm, squared) and log likelihood (nats) may be off.

fp32 differs between machines by the order of sums; bf16 by its 8 bits.
"""


def write_check(folder: Path, model: AnyModel) -> None:
    """Record what `model` answers.

    Raises:
        BundleError: it is no number.
    """
    limit = model.settings.max_tokens
    sequence = SEQUENCE[: limit - model.settings.alphabet.num_specials] if limit else SEQUENCE
    embedding, log_likelihood = _answer(model, sequence)
    if not _are_numbers(embedding, log_likelihood):
        raise BundleError(
            "The model answers a known sequence with something that is no number, so it is not "
            "written; take the weights of an earlier step."
        )
    record = {
        "sequence": sequence,
        "dtype": _dtype(model),
        "log_likelihood": None if log_likelihood is None else round(log_likelihood, 6),
        "embedding": [float(f"{value:.6g}") for value in embedding],
    }
    (folder / CHECK).write_text(json.dumps(record) + "\n")


def verify_check(folder: Path, model: AnyModel) -> bool:
    """Compare `model` with the record beside its weights; False if there is none (strangers').

    Raises:
        BundleError: it answers otherwise, or with something that is no number.
    """
    record = _read(folder / CHECK)
    sequence = SEQUENCE[:8] if record is None else str(record["sequence"])
    embedding, log_likelihood = _answer(model, sequence)
    if not _are_numbers(embedding, log_likelihood):
        raise BundleError(
            f"The model in {folder} answers a known sequence with something that is no number; "
            "serve another checkpoint."
        )
    if record is None:
        return False
    if (log_likelihood is None) != (record["log_likelihood"] is None):
        raise BundleError(
            f"{folder / CHECK} belongs to a model with{'' if log_likelihood is None else 'out'} a "
            "language-model head, unlike these weights; copy the folder again."
        )
    expected = np.array(record["embedding"], np.float64)
    far, apart = TOLERANCE["bf16" if "bf16" in (record["dtype"], _dtype(model)) else "fp32"]
    if expected.shape != embedding.shape:
        raise BundleError(f"{folder / CHECK} belongs to a model of another width; copy it again.")
    error = ((embedding - expected) ** 2).sum() / max((expected**2).sum(), 1e-12)
    difference = abs((log_likelihood or 0.0) - float(record["log_likelihood"] or 0.0))
    if error > far or difference > apart:
        raise BundleError(
            f"The model in {folder} answers a known sequence otherwise than its record in {CHECK} "
            f"(embedding off by {error:.2g}, log likelihood by {difference:.2g} nats); its weights "
            "are damaged or another model's: copy the folder again."
        )
    return True


def _answer(model: AnyModel, sequence: str) -> tuple[np.ndarray, float | None]:
    """Mean embedding of the last layer, [D] float64, and mean log likelihood, nats, with a head."""
    residues = encode_residues(sequence)
    alphabet = model.settings.alphabet
    tokens = torch.from_numpy(alphabet.add_specials(residues)).long()
    packed = Packed(tokens.to(model.embed.weight.device), (len(tokens),))
    with torch.inference_mode():
        (final_TD,) = model.represent(packed, [model.settings.layers])
        inner_LD = final_TD[1 : 1 + len(residues)]
        embedding = inner_LD.float().mean(0).cpu().numpy().astype(np.float64)
        if not model.has_head:
            return embedding, None
        log_p_LV = torch.log_softmax(model(packed)[1 : 1 + len(residues)].float(), -1)
        picked = log_p_LV.gather(1, packed.tokens_T[1 : 1 + len(residues), None])
        return embedding, float(picked.double().mean())


def _are_numbers(embedding: np.ndarray, log_likelihood: float | None) -> bool:
    return bool(np.isfinite(embedding).all() and np.isfinite(log_likelihood or 0.0))


def _dtype(model: AnyModel) -> str:
    return "fp32" if model.embed.weight.dtype == torch.float32 else "bf16"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(patiently(file.read_text))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(str(file), error) from None
    except ValueError:
        raise BundleError(f"{file} cannot be read; copy the folder again.") from None
    if not isinstance(record, dict) or not {"sequence", "dtype", "log_likelihood", "embedding"} <= (
        set(record)
    ):
        raise BundleError(f"{file} is no record of an answer; copy the folder again.")
    return record
