"""What engines compute of items: everything that is asked of a sequence, one row of numbers.

Shape letters: see evaluation/requests.py; V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from raptide.alphabet import FIRST_RESIDUE, RESIDUES, STANDARD, encode_residues
from raptide.bulk.work import CANARY, Compute, Model, Precision
from raptide.calls.scoring import log_softmax
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
        """All numbers of each item in one row, [item.floats] fp32.

        Passes of all items share batches, whatever they are for.
        """
        passes = _Passes(
            self._embed(items), self._logits(items), self._masked_alone(items), self._pseudo(items)
        )
        return [
            np.concatenate([self._answer(request, passes).ravel() for request in item.requests()])
            for item in items
        ]

    def _embed(self, items: list[Item]) -> dict[tuple[str, int], np.ndarray]:
        """Vectors of all residues of those items that want some, by sequence and layer."""
        wanted = _wanted(items, lambda reading: reading.kind in EMBEDDED)
        layers = sorted({request.reading.layer for request in wanted})
        sequences = list(dict.fromkeys(request.sequence for request in wanted))
        if not sequences:
            return {}
        found = self._engine.embed(sequences, layers, "residue", "window")
        return {
            (sequence, layer): vectors if len(layers) == 1 else vectors[place]
            for sequence, vectors in zip(sequences, found, strict=True)
            for place, layer in enumerate(layers)
        }

    def _logits(self, items: list[Item]) -> dict[tuple[str, bool], np.ndarray]:
        """Logits of whole sequences, [L, V], by sequence and whether it is corrupted."""
        settings = self._engine.model.settings
        shown: dict[tuple[str, bool], np.ndarray] = {}
        for request in _wanted(items, _is_one_pass):
            sequence, corrupted = request.sequence, request.reading.kind == "masked"
            if (sequence, corrupted) not in shown:
                residues = encode_residues(sequence)
                chosen = choose_residues(sequence)
                if corrupted and not settings.blind:  # who is blind to a residue is shown it
                    residues = chosen.corrupt(residues, settings.alphabet.mask)
                shown[sequence, corrupted] = residues
        return dict(zip(shown, self._forward.logits(list(shown.values())), strict=True))

    def _masked_alone(self, items: list[Item]) -> dict[Request, np.ndarray]:
        """Log probabilities at places that are masked one at a time, [P, V]."""
        wanted = _wanted(items, lambda reading: reading.method == "masked-marginals")
        pieces = [(encode_residues(each.sequence), np.array(each.places)) for each in wanted]
        rows: list[list[np.ndarray]] = [[] for _ in pieces]
        for index, row in self._forward.masked_log_p(pieces):
            rows[index].append(row)
        return dict(zip(wanted, map(np.stack, rows), strict=True))

    def _pseudo(self, items: list[Item]) -> dict[str, float]:
        """Pseudo log likelihoods, nats."""
        wanted = _wanted(items, lambda reading: reading.kind == "pseudo")
        sequences = [request.sequence for request in wanted]
        means: Any = []
        if wanted:
            means = self._engine.score_sequences(sequences, "pseudo-ppl", "window")
        return {each: mean * len(each) for each, mean in zip(sequences, means, strict=True)}

    def _answer(self, request: Request, passes: _Passes) -> np.ndarray:
        reading, sequence, places = request
        match reading.kind:
            case "residues":
                return passes.vectors[sequence, reading.layer]
            case "mean":
                return passes.vectors[sequence, reading.layer].mean(0)
            case "sites":
                return passes.vectors[sequence, reading.layer][list(places)]
            case "contacts":
                return self._contacts(sequence, reading.method)
            case "masked":
                chosen = choose_residues(sequence)
                log_p = log_softmax(passes.logits[sequence, True][chosen.places])
                return score_masked(log_p, chosen, encode_residues(sequence), reading.method)
            case "marginals":
                alone = passes.masked_alone.get(request)
                if alone is None:
                    alone = log_softmax(passes.logits[sequence, False][list(places)])
                return alone[:, STANDARD_IDS]
            case "pseudo":
                return np.array([passes.pseudo[sequence]], np.float32)
            case _:
                return letter_vectors(self._engine)

    def _contacts(self, sequence: str, method: str) -> np.ndarray:
        maps = self._forward.corrected_maps(encode_residues(sequence))
        scores = self._heads[method].probabilities(maps).cpu().numpy()
        return scores[np.triu_indices(len(scores), 1)]


class _Passes(NamedTuple):
    """What forward passes gave for some items."""

    vectors: dict[tuple[str, int], np.ndarray]
    logits: dict[tuple[str, bool], np.ndarray]
    masked_alone: dict[Request, np.ndarray]
    pseudo: dict[str, float]


def _wanted(items: list[Item], which: Callable[[Reading], bool]) -> list[Request]:
    return [each for item in items for each in item.requests() if which(each.reading)]


def _is_one_pass(reading: Reading) -> bool:
    unmasked = reading.kind == "marginals" and reading.method != "masked-marginals"
    return reading.kind == "masked" or unmasked


def letter_vectors(engine: Engine) -> np.ndarray:
    """Row of each standard letter in the output head, [20, D] fp32; in tied models also their
    embedding."""
    return engine.model.letters.detach().float().cpu().numpy()[STANDARD_IDS]


def _device_of(engine: Engine) -> Any:
    return engine.model.embed.weight.device


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
