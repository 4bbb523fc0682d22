"""What engines compute of items: everything that is asked of a sequence, one row of numbers.

Shape letters: see evaluation/requests.py; V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raptide.alphabet import FIRST_RESIDUE, RESIDUES, STANDARD, encode_residues
from raptide.bulk.work import CANARY, Compute, Model, Precision
from raptide.evaluation.masks import choose_residues, score_masked
from raptide.evaluation.requests import Reading, Request
from raptide.evaluation.subjects.items import EMBEDDED, Item
from raptide.inference.batching import plan_batches

if TYPE_CHECKING:
    from raptide.inference.engine import Engine
    from raptide.model.contacts import ContactHead

SLICE_TOKENS = 1 << 14
"""Tokens that are computed at once: as vectors of all residues they are held in memory."""

STANDARD_IDS = [FIRST_RESIDUE + RESIDUES.index(letter) for letter in STANDARD]

Head = tuple[tuple[float, ...], float]
"""Weights and bias of a contact regression."""


@dataclass(frozen=True)
class ReadWork:
    """All that tasks ask of a model, as `raptide.bulk` computes it: column `values`, fp32."""

    model: Model
    precision: Precision
    heads: dict[str, Head]
    """Contact regressions by the method of the readings that use them."""

    canary = Item(CANARY, ((Reading("mean", 0), ()),)).write()

    def fingerprint(self) -> dict[str, Any]:
        return {
            "work": "evaluation",
            "model": self.model.digest,
            "precision": self.precision,
            "heads": sorted(self.heads),
        }

    def flaw(self, name: str, item: str, length: int) -> str:
        return ""

    def tokens(self, residues: np.ndarray) -> np.ndarray:
        return residues + 2

    def output_bytes(self, residues: np.ndarray) -> np.ndarray:
        return residues * (4 * self.model.width)

    def slices(self, items: list[str], most: int) -> Iterator[list[int]]:
        costs = [Item.read(item).tokens for item in items]
        yield from plan_batches(costs, min(most, SLICE_TOKENS))

    def open(self, threads: int) -> Compute:
        import torch

        from raptide.inference.engine import Engine
        from raptide.model.contacts import ContactHead

        torch.set_num_threads(threads)
        engine = Engine.load(self.model.path, dtype=self.precision)
        heads = {
            method: ContactHead(torch.tensor([weight]), torch.tensor([bias]))
            for method, (weight, bias) in self.heads.items()
        }
        reader = ItemReader(engine, heads)
        return lambda items: reader.read([Item.read(item) for item in items])

    def columns(self, items: list[str], values: list[np.ndarray]) -> dict[str, pa.Array]:
        flat = np.concatenate([*values, np.empty(0, np.float32)])
        ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
        return {"values": pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat))}


class ItemReader:
    """Reads items off one engine."""

    def __init__(self, engine: Engine, heads: dict[str, ContactHead]) -> None:
        from raptide.inference.forward import Forward

        self._engine, self._heads = engine, heads
        self._forward = Forward(engine.model, _device_of(engine), engine.max_batch_tokens)

    def read(self, items: list[Item]) -> list[np.ndarray]:
        """All numbers of each item in one row, [item.floats] fp32."""
        vectors = self._embed(items)
        return [
            np.concatenate([self._answer(request, vectors).ravel() for request in item.requests()])
            for item in items
        ]

    def _embed(self, items: list[Item]) -> dict[tuple[str, int], np.ndarray]:
        """Vectors of all residues of those items that want some, by sequence and layer."""
        asked = [
            item for item in items if any(reading.kind in EMBEDDED for reading, _ in item.wants)
        ]
        layers = sorted({r.layer for item in asked for r, _ in item.wants if r.kind in EMBEDDED})
        if not asked:
            return {}
        sequences = [item.sequence for item in asked]
        found = self._engine.embed(sequences, layers, "residue", "window")
        return {
            (sequence, layer): vectors if len(layers) == 1 else vectors[place]
            for sequence, vectors in zip(sequences, found, strict=True)
            for place, layer in enumerate(layers)
        }

    def _answer(self, request: Request, vectors: dict[tuple[str, int], np.ndarray]) -> np.ndarray:
        reading, sequence, places = request
        match reading.kind:
            case "residues":
                return vectors[sequence, reading.layer]
            case "mean":
                return vectors[sequence, reading.layer].mean(0)
            case "sites":
                return vectors[sequence, reading.layer][list(places)]
            case "contacts":
                return self._contacts(sequence, reading.method)
            case "masked":
                return self._masked(sequence, reading.method)
            case "marginals":
                return self._log_p(sequence, places, reading.method)[:, STANDARD_IDS]
            case "pseudo":
                (mean,) = self._engine.score_sequences([sequence], "pseudo-ppl", "window")
                return np.array([mean * len(sequence)], np.float32)
            case _:
                return letter_vectors(self._engine)

    def _contacts(self, sequence: str, method: str) -> np.ndarray:
        (residues,) = _encode([sequence])
        maps = self._forward.corrected_maps(residues)
        scores = self._heads[method].probabilities(maps).cpu().numpy()
        return scores[np.triu_indices(len(scores), 1)]

    def _masked(self, sequence: str, method: str) -> np.ndarray:
        chosen = choose_residues(sequence)
        (residues,) = _encode([sequence])
        alphabet = self._engine.model.settings.alphabet
        (logits,) = self._forward.logits([chosen.corrupt(residues, alphabet.mask)])
        return score_masked(_log_softmax(logits[chosen.places]), chosen, residues, method)

    def _log_p(self, sequence: str, places: Sequence[int], method: str) -> np.ndarray:
        (residues,) = _encode([sequence])
        if method == "masked-marginals":
            rows = self._forward.masked_log_p([(residues, np.array(places))])
            return np.stack([row for _, row in rows])
        (logits,) = self._forward.logits([residues])
        return _log_softmax(logits[list(places)])


def letter_vectors(engine: Engine) -> np.ndarray:
    """Row of each standard letter in the output head, [20, D] fp32; in tied models also their
    embedding."""
    model = engine.model
    table = model.embed.weight if model.settings.traits.tied_head else model.head_weight
    return table.detach().float().cpu().numpy()[STANDARD_IDS]


def _encode(sequences: list[str]) -> list[np.ndarray]:
    return [encode_residues(sequence) for sequence in sequences]


def _device_of(engine: Engine) -> Any:
    return engine.model.embed.weight.device


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    from raptide.inference.scoring import log_softmax

    return log_softmax(logits)


def fit_head(
    model: Model, precision: Precision, threads: int, examples: Sequence[tuple[str, np.ndarray]]
) -> Head:
    """The paper's unsupervised contacts: a sparse regression on a few known structures.

    Args:
        examples: sequences with their contact maps [L, L] (`inference.contact_fit.contact_map`).
    """
    import torch

    from raptide.inference.contact_fit import fit_contacts
    from raptide.inference.engine import Engine

    torch.set_num_threads(threads)
    head = fit_contacts(Engine.load(model.path, dtype=precision), examples)
    return tuple(head.weight[0].tolist()), float(head.bias[0])
