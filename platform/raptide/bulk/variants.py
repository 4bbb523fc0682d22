"""What is computed of rows with variants: a score for each model and method.

An item is a protein and a variant of it, as one string: `MKTAYIAKQR K2A:Q9E`; the wild type itself
is `MKTAYIAKQR `. Variants of one protein share passes, so they are computed side by side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from raptide.alphabet import decode_residues, encode_residues
from raptide.bulk.work import CANARY, Compute, Long, Model, Precision, judge_length
from raptide.calls.scoring import log_softmax, score_changes
from raptide.calls.variants import apply_variant, parse_variant
from raptide.methods import VariantMethod

Score = Callable[[dict[str, list[str]]], dict[tuple[str, str], float]]
"""Scores by protein and variant, given each protein's variants."""

WILD_TYPES_KEPT = 16
"""Proteins whose own pseudo log likelihood is remembered for their next variants."""


@dataclass(frozen=True)
class VariantWork:
    """How much likelier variants are than their proteins, nats, float64; 0 for the wild type."""

    models: tuple[Model, ...]
    precision: Precision
    long: Long
    methods: tuple[VariantMethod, ...]
    names: tuple[str, ...]
    """Of the columns: all methods of the first model, then those of the next."""
    offset: int = 0
    """Number of the position before each protein's first, as the input counts; items do not."""

    canary = f"{CANARY} K2A"

    def __post_init__(self) -> None:
        for model in self.models:
            model.refuse_method(*self.methods)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "work": "variants",
            "models": [model.digest for model in self.models],
            "methods": list(self.methods),
            "columns": list(self.names),
            "precision": self.precision,
            "long": self.long,
            "offset": self.offset,
        }

    def flaw(self, name: str, item: str, length: int) -> str:
        most = min(model.max_residues for model in self.models)
        return judge_length(name, length, most, self.long)

    def tokens(self, residues: np.ndarray) -> np.ndarray:
        """Of a substitution that shares nothing."""
        scans = [2 * residues if method == "pseudo-ppl" else 1 for method in self.methods]
        return (residues + 2) * sum(scans) * len(self.models)

    def tokens_beside(
        self, proteins: Sequence[Hashable], lengths: Sequence[int], variants: Sequence[str]
    ) -> np.ndarray:
        """Tokens that are computed of each variant beside those before it, [n] int64.

        Args:
            proteins: what tells the variants' proteins apart.
            lengths: residues of each.
        """
        seen: set[Any] = set()
        costs = []
        for protein, length, variant in zip(proteins, lengths, variants, strict=True):
            passes = 0
            for method in self.methods if variant else ():
                new = {(method, protein, *each) for each in _steps(method, variant)} - seen
                passes += len(new) * (length if method == "pseudo-ppl" else 1)
                seen |= new
            costs.append(passes * (length + 2) * len(self.models))
        return np.array(costs, np.int64)

    def output_bytes(self, residues: np.ndarray) -> np.ndarray:
        return np.full_like(residues, 8 * len(self.names))

    def slices(self, items: list[str], most: int) -> Iterator[list[int]]:
        """Indices of items, `most` tokens at once: by protein, the longest first, and position."""
        pairs = [read_item(item) for item in items]
        places = [_first_position(variant) for _, variant in pairs]
        order = sorted(
            range(len(items)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], places[i], i)
        )
        proteins, variants = zip(*(pairs[i] for i in order), strict=True) if items else ((), ())
        costs = self.tokens_beside(proteins, list(map(len, proteins)), variants)
        held: list[int] = []
        tokens = 0
        for index, cost in zip(order, costs.tolist(), strict=True):
            if held and tokens + cost > most:
                yield held
                held, tokens = [], 0
            held.append(index)
            tokens += cost
        if held:
            yield held

    def open(self, threads: int) -> Compute:
        import torch

        from raptide.inference.engine import Engine

        torch.set_num_threads(threads)
        scores: list[Score] = []
        for model in self.models:
            engine = Engine.load(model.path, dtype=self.precision)
            scores += [_score_by(engine, method, self.long) for method in self.methods]

        def compute(items: list[str]) -> Sequence[tuple[float, ...]]:
            pairs = [read_item(item) for item in items]
            groups: dict[str, list[str]] = {}
            for protein, variant in dict.fromkeys(pairs):
                if variant:
                    groups.setdefault(protein, []).append(variant)
            found = [score(groups) for score in scores]
            return [tuple(each.get(pair, 0.0) for each in found) for pair in pairs]

        return compute

    def columns(
        self, items: list[str], values: list[tuple[float, ...] | None]
    ) -> dict[str, pa.Array]:
        return {
            name: pa.array([value and value[place] for value in values], pa.float64())
            for place, name in enumerate(self.names)
        }


def write_item(protein: str, variant: str) -> str:
    return f"{protein} {variant}"


def read_item(item: str) -> tuple[str, str]:
    protein, variant = item.split(" ")
    return protein, variant


def _steps(method: VariantMethod, variant: str) -> set[tuple[str, ...]]:
    """What is computed for a variant; a step that two have in common is taken once."""
    if method == "wt-marginals":
        return {()}
    if method == "masked-marginals":
        return {(part[:-1],) for part in variant.split(":")}
    return {(), (variant,)}


def _first_position(variant: str) -> int:
    digits = re.search("[0-9]+", variant)
    return int(digits[0]) if digits else 0


def _score_by(engine: Any, method: VariantMethod, long: Long) -> Score:
    """The engine's `score_variants` for many proteins at once."""
    if method == "pseudo-ppl":
        return _pseudo_log_likelihoods(engine, "window" if long == "window" else "error")
    if method == "wt-marginals":
        return _wild_type_marginals(engine, "window" if long == "window" else "error")
    return _masked_marginals(engine)


def _wild_type_marginals(engine: Any, long: str) -> Score:
    def score(groups: dict[str, list[str]]) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        tables = engine.logits(list(groups), long)
        for (protein, variants), logits in zip(groups.items(), tables, strict=True):
            found |= _scores(protein, variants, dict(enumerate(log_softmax(logits))))
        return found

    return score


def _masked_marginals(engine: Any) -> Score:
    def score(groups: dict[str, list[str]]) -> dict[tuple[str, str], float]:
        whole = {each: v for each, v in groups.items() if len(each) <= engine.max_residues}
        positions = [_positions(protein, variants) for protein, variants in whole.items()]
        tables = engine.masked_log_p(list(zip(whole, positions, strict=True)))
        found: dict[tuple[str, str], float] = {}
        for (protein, variants), where, table in zip(whole.items(), positions, tables, strict=True):
            found |= _scores(protein, variants, dict(zip(where, table, strict=True)))
        for protein in groups.keys() - whole.keys():
            variants = groups[protein]
            values = engine.score_variants(protein, variants, "masked-marginals", "window")
            found |= _by_variant(protein, variants, values)
        return found

    return score


def _pseudo_log_likelihoods(engine: Any, long: str) -> Score:
    @lru_cache(WILD_TYPES_KEPT)
    def before(protein: str) -> float:
        return engine.score_sequences([protein], "pseudo-ppl", long)[0]

    def score(groups: dict[str, list[str]]) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        for protein, variants in groups.items():
            residues = encode_residues(protein)
            changes = [parse_variant(variant, residues) for variant in variants]
            mutants = [decode_residues(apply_variant(residues, each)) for each in changes]
            after = engine.score_sequences(mutants, "pseudo-ppl", long)
            found |= _by_variant(protein, variants, (after - before(protein)) * len(protein))
        return found

    return score


def _positions(protein: str, variants: list[str]) -> list[int]:
    residues = encode_residues(protein)
    changes = [parse_variant(variant, residues) for variant in variants]
    return sorted({each.position for change in changes for each in change})


def _scores(
    protein: str, variants: list[str], rows: dict[int, np.ndarray]
) -> dict[tuple[str, str], float]:
    residues = encode_residues(protein)
    changes = [parse_variant(variant, residues) for variant in variants]
    return _by_variant(protein, variants, score_changes(changes, rows))


def _by_variant(
    protein: str, variants: list[str], values: np.ndarray
) -> dict[tuple[str, str], float]:
    return {(protein, v): value for v, value in zip(variants, values.tolist(), strict=True)}
