"""The engine: one loaded model, protein sequences in, numpy arrays out.

    engine = Engine.load("exported")
    engine.embed(["MKTAYIAKQR", "GSHM"])                      # [2, D]
    engine.embed(["MKTAYIAKQR"], pooling="residue")           # [[10, D]]
    engine.score_sequences(["MKTAYIAKQR", "GSHM"])            # [2], higher is likelier
    engine.score_variants("MKTAYIAKQR", ["K2A", "K2A:Q9E"])   # [2], above 0 is likelier than before
    engine.scan("MKTAYIAKQR")                                 # [10, 20]

Where a method takes several sequences, a list gives all results at once, in order, and an iterator
(a generator, say) gives an iterator that reads ahead a bounded number of residues: for inputs that
do not fit in memory. A sequence's numbers do not depend on what else is in the call.

Sequences longer than `max_residues` are refused (`long="error"`) or computed in overlapping
windows (`long="window"`); `calls/windows.py` tells how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch

from raptide.calls.inputs import (
    read_ahead,
    read_layers,
    read_sequences,
    refuse_no_list,
    refuse_unknown,
)
from raptide.calls.scoring import (
    log_likelihood,
    log_softmax,
    score_changes,
    score_substitutions,
)
from raptide.calls.variants import apply_variant, parse_variant
from raptide.errors import BundleError
from raptide.inference.ability import refuse_likelihoods, refuse_maps
from raptide.inference.forward import Forward
from raptide.methods import Long, Pooling, ScanMethod, ScoreMethod, VariantMethod
from raptide.model.device import compilation_pays, multiplies_bf16_faster
from raptide.model.families import AnyModel
from raptide.model.formats.detect import read_weights

CONTACT_RESIDUES = 2048
"""Longest sequence whose contacts are computed: memory grows with the square, and is then about
16 * heads * 2048^2 bytes (1.3 GB at 20 heads)."""

READ_AHEAD_BATCHES = 16
"""Full batches of residues that are read from an iterator before the next are computed; four a lane
where that is more."""

T = TypeVar("T")


class Engine:
    """One model on one device. Safe to call from several threads."""

    def __init__(
        self, model: AnyModel, lineage: dict[str, Any], device: torch.device, max_batch_tokens: int
    ) -> None:
        self.lineage = lineage
        """Where the weights come from, as the bundle's raptide.json says; {} for strangers'."""
        self.max_batch_tokens = max_batch_tokens
        self.model = model
        self._forward = Forward(model, device, max_batch_tokens)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        max_batch_tokens: int = 4096,
    ) -> Engine:
        """Load a model.

        Args:
            path: a model folder, raptide's or transformers', or a .pt file of fair-esm. Encoders
                and classifiers (EsmModel, EsmForSequenceClassification, ...), which have no
                language-model head, open for embeddings and contacts.
            device: "auto" takes the first GPU where there is one.
            dtype: "auto" takes bf16 where the device multiplies it faster (GPUs from Ampere on,
                CPUs with AMX or AVX512-BF16), fp32 elsewhere. bf16 embeddings have a cosine above
                0.9995 with those of fp32.
            max_batch_tokens: tokens in one forward pass; a longer sequence goes alone. On CPUs
                passes run side by side in lanes of threads (inference/lanes.py), which share these
                tokens; `torch.set_num_threads`, or OMP_NUM_THREADS, says how many threads.

        On GPUs the layers are compiled, which the first batches wait for (model/device.py).

        Raises:
            BundleError: there is no such model; the message says what there is instead.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(device)
        if dtype == "auto":
            dtype = "bf16" if multiplies_bf16_faster(target) else "fp32"
        weights = read_weights(path)
        model = weights.build().to(target, torch.bfloat16 if dtype == "bf16" else torch.float32)
        if compilation_pays(target):
            model.compile_layers()
        return cls(model, dict(weights.lineage), target, max_batch_tokens)

    @property
    def width(self) -> int:
        """Values in one embedding."""
        return self.model.settings.width

    @property
    def tokens(self) -> tuple[str, ...]:
        """The model's tokens by id: the columns of `logits`."""
        return self.model.settings.alphabet.tokens

    @property
    def max_residues(self) -> int:
        """Residues of the longest sequence that is computed whole."""
        return self._forward.max_residues

    @property
    def lanes(self) -> int:
        """Batches that it computes side by side for the calling thread, where there are enough."""
        return self._forward.lanes.count

    @property
    def dtype(self) -> str:
        return "bf16" if self.model.embed.weight.dtype == torch.bfloat16 else "fp32"

    @overload
    def embed(
        self,
        sequences: Sequence[str],
        layers: Sequence[int] = ...,
        pooling: Pooling = ...,
        long: Long = ...,
    ) -> np.ndarray | list[np.ndarray]: ...
    @overload
    def embed(
        self,
        sequences: Iterator[str],
        layers: Sequence[int] = ...,
        pooling: Pooling = ...,
        long: Long = ...,
    ) -> Iterator[np.ndarray]: ...
    def embed(
        self,
        sequences: Sequence[str] | Iterator[str],
        layers: Sequence[int] = (-1,),
        pooling: Pooling = "mean",
        long: Long = "error",
    ) -> np.ndarray | list[np.ndarray] | Iterator[np.ndarray]:
        """Representations of each sequence, fp32.

        Args:
            layers: 0 is the embedding, i the output of layer i; negative counts from the last.
            pooling: "mean" over the residues (specials left out), "bos" the first token (the mean
                over the windows of a long sequence), "residue" one vector a residue.

        Returns:
            [n, D] for one layer, [n, layers, D] for several; with pooling "residue" a list of
            [L, D] or [layers, L, D], one per sequence. For an iterator, an iterator of the same.

        Raises:
            SequenceError: a sequence is empty, too long or holds something that is no residue.
            ConfigError: the model has no such layer.
        """
        refuse_unknown("pooling", pooling, Pooling)
        wanted = read_layers(layers, self.model.settings.layers)

        def compute(residues: list[np.ndarray]) -> list[np.ndarray]:
            found = self._forward.represent(residues, wanted, pooling)
            return found if len(wanted) > 1 else [each[0] for each in found]

        results = self._map(sequences, compute, long)
        if pooling == "residue" or isinstance(results, Iterator):
            return results
        shape = (0, self.width) if len(wanted) == 1 else (0, len(wanted), self.width)
        return np.stack(results) if results else np.empty(shape, np.float32)

    @overload
    def logits(self, sequences: Sequence[str], long: Long = ...) -> list[np.ndarray]: ...
    @overload
    def logits(self, sequences: Iterator[str], long: Long = ...) -> Iterator[np.ndarray]: ...
    def logits(
        self, sequences: Sequence[str] | Iterator[str], long: Long = "error"
    ) -> list[np.ndarray] | Iterator[np.ndarray]:
        """Logits of each residue over `tokens`, nothing masked, [L, V] fp32 for each sequence.

        Raises:
            BundleError: the model has no language-model head.
            SequenceError: as in `embed`.
        """
        refuse_likelihoods(self.model, "")
        return self._map(sequences, self._forward.logits, long)

    @overload
    def contacts(self, sequences: Sequence[str]) -> list[np.ndarray]: ...
    @overload
    def contacts(self, sequences: Iterator[str]) -> Iterator[np.ndarray]: ...
    def contacts(
        self, sequences: Sequence[str] | Iterator[str]
    ) -> list[np.ndarray] | Iterator[np.ndarray]:
        """Probability that two residues touch (Cβ within 8 Å), [L, L] fp32 for each sequence.

        Raises:
            BundleError: the model has no contact head, or, as an LSTM, could have none.
            SequenceError: as in `embed`, or a sequence has more than CONTACT_RESIDUES residues.
        """
        refuse_maps(self.model)
        head = self.model.contact_head
        if head is None:
            raise BundleError(
                "This model has no contact head; fit one with jobs/export_model.py "
                "--fit-contacts, or load a bundle that has one."
            )

        def compute(residues: list[np.ndarray]) -> list[np.ndarray]:
            maps = map(self._forward.corrected_maps, residues)
            return [head.probabilities(each).cpu().numpy() for each in maps]

        return self._map(sequences, compute, "error", min(self.max_residues, CONTACT_RESIDUES))

    def corrected_maps(self, sequence: str) -> Iterator[np.ndarray]:
        """What contacts are computed from: corrected attention, [H, L, L] fp32 layer by layer.

        Raises:
            SequenceError: as in `contacts`.
        """
        refuse_maps(self.model)
        (residues,) = read_sequences([sequence], min(self.max_residues, CONTACT_RESIDUES))
        return (maps.cpu().numpy() for maps in self._forward.corrected_maps(residues))

    @overload
    def score_sequences(
        self, sequences: Sequence[str], method: ScoreMethod = ..., long: Long = ...
    ) -> np.ndarray: ...
    @overload
    def score_sequences(
        self, sequences: Iterator[str], method: ScoreMethod = ..., long: Long = ...
    ) -> Iterator[float]: ...
    def score_sequences(
        self,
        sequences: Sequence[str] | Iterator[str],
        method: ScoreMethod = "pseudo-ppl",
        long: Long = "error",
    ) -> np.ndarray | Iterator[float]:
        """Mean log likelihood of each sequence's residues in nats, [n] float64; higher is likelier.

        "pseudo-ppl" masks one residue at a time (Salazar et al., 2020): exp(-score) is the pseudo
        perplexity. It costs a forward pass of the whole sequence per residue. "one-pass" reads all
        likelihoods off a single unmasked pass: cheap, and optimistic, but for an LSTM, which is
        blind to each residue anyway.

        Raises:
            BundleError: the model has no language-model head, or reads no `<mask>`.
            SequenceError: as in `embed`.
        """
        refuse_unknown("method", method, ScoreMethod)
        refuse_likelihoods(self.model, method)

        def compute(residues: list[np.ndarray]) -> list[float]:
            if method == "pseudo-ppl":
                return [self._pseudo_log_likelihood(each) / len(each) for each in residues]
            tables = map(log_softmax, self._forward.logits(residues))
            return [
                log_likelihood(table, each) / len(each)
                for table, each in zip(tables, residues, strict=True)
            ]

        results = self._map(sequences, compute, long)
        return results if isinstance(results, Iterator) else np.array(results, np.float64)

    def score_variants(
        self,
        sequence: str,
        variants: Sequence[str],
        method: VariantMethod = "wt-marginals",
        long: Long = "error",
    ) -> np.ndarray:
        """How much likelier each variant is than the sequence, in nats, [n] float64.

        Args:
            variants: substitutions counted from 1, `A42G`, several joined as `A42G:K50R`.
            method: "wt-marginals" reads log p(mutant) - log p(wild type) off one unmasked pass;
                "masked-marginals" off passes with each changed position masked in turn; both add up
                over a variant's positions. "pseudo-ppl" is the difference of the pseudo log
                likelihoods of whole sequences, a pass per residue and variant. (fair-esm's own
                script compares each position with the residue before it, so its numbers are not
                these.) Meier et al., NeurIPS 2021.

        Raises:
            BundleError: the model has no language-model head.
            SequenceError: as in `embed`; or a variant does not fit the sequence.
        """
        refuse_unknown("method", method, VariantMethod)
        refuse_likelihoods(self.model, method)
        refuse_no_list(variants, "variants")
        (residues,) = read_sequences([sequence], self._limit(long))
        changes = [parse_variant(variant, residues) for variant in variants]
        if method == "pseudo-ppl":
            before = self._pseudo_log_likelihood(residues)
            mutants = (apply_variant(residues, each) for each in changes)
            return np.array([self._pseudo_log_likelihood(m) - before for m in mutants], np.float64)
        positions = np.unique([each.position for change in changes for each in change]).astype(int)
        rows = dict(zip(positions, self._marginals(residues, positions, method), strict=True))
        return score_changes(changes, rows)

    def scan(
        self, sequence: str, method: ScanMethod = "wt-marginals", long: Long = "error"
    ) -> np.ndarray:
        """All single substitutions: [L, 20] fp32, as `score_variants` scores them.

        Columns are the standard residues in alphabetical order (`raptide.alphabet.STANDARD`); the
        sequence's own residue has 0.

        Raises:
            BundleError: the model has no language-model head.
            SequenceError: as in `embed`.
        """
        refuse_unknown("method", method, ScanMethod)
        refuse_likelihoods(self.model, method)
        (residues,) = read_sequences([sequence], self._limit(long))
        return score_substitutions(
            self._marginals(residues, np.arange(len(residues)), method), residues
        )

    def masked_log_p(self, pieces: Sequence[tuple[str, Sequence[int]]]) -> list[np.ndarray]:
        """Log probabilities over `tokens` at positions while each alone is masked.

        What pseudo-ppl and masked-marginals are made of (calls/scoring.py), for callers who
        share batches between sequences.

        Args:
            pieces: sequences with positions in them, counted from 0.

        Returns:
            [positions, V] fp32 for each piece.

        Raises:
            BundleError: the model has no language-model head, or reads no `<mask>`.
            SequenceError: as in `embed`.
        """
        refuse_likelihoods(self.model, "masked-marginals")
        residues = read_sequences([sequence for sequence, _ in pieces], self.max_residues)
        positions = [np.asarray(where, int) for _, where in pieces]
        rows: list[list[np.ndarray]] = [[] for _ in pieces]
        for index, row in self._forward.masked_log_p(list(zip(residues, positions, strict=True))):
            rows[index].append(row)
        empty = np.empty((0, len(self.tokens)), np.float32)
        return [np.stack(each) if each else empty for each in rows]

    def _marginals(
        self, residues: np.ndarray, positions: np.ndarray, method: ScanMethod
    ) -> np.ndarray:
        if not len(positions):
            return np.empty((0, len(self.tokens)), np.float32)
        if method == "masked-marginals":
            rows = self._forward.masked_log_p([(residues, positions)])
            return np.stack([row for _, row in rows])
        return log_softmax(self._forward.logits([residues])[0][positions])

    def _pseudo_log_likelihood(self, residues: np.ndarray) -> float:
        table = self._marginals(residues, np.arange(len(residues)), "masked-marginals")
        return log_likelihood(table, residues)

    def _map(
        self,
        sequences: Sequence[str] | Iterator[str],
        compute: Callable[[list[np.ndarray]], list[T]],
        long: Long,
        limit: float | None = None,
    ) -> list[T] | Iterator[T]:
        """A list for a list, an iterator for an iterator."""
        if limit is None:
            limit = self._limit(long)
        if isinstance(sequences, Iterator):
            batches = max(READ_AHEAD_BATCHES, 4 * self.lanes)
            budget = batches * self.max_batch_tokens
            return chain.from_iterable(map(compute, read_ahead(sequences, limit, budget)))
        return compute(read_sequences(sequences, limit))

    def _limit(self, long: Long) -> float:
        refuse_unknown("long", long, Long)
        return float("inf") if long == "window" else self.max_residues
