"""The engine: one loaded model, lists of protein sequences in, numpy arrays out.

    engine = Engine.load("runs/demo/checkpoints/step-00000400/model")
    engine.embed(["MKTAYIAKQR", "GSHM"])               # [2, D]
    engine.embed(["MKTAYIAKQR"], pooling="residue")    # [[10, D]]
    engine.score_sequences(["MKTAYIAKQR", "GSHM"])     # [2], higher is likelier

Sequences are packed to a token budget and the order is restored; a sequence's numbers do not
depend on what else is in the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raptide.alphabet import encode_residues
from raptide.errors import ConfigError, SequenceError
from raptide.inference.batching import plan_batches
from raptide.model.bundle import load_bundle
from raptide.model.packed import Packed
from raptide.model.transformer import Esm

Pooling = Literal["mean", "bos", "residue"]
ScoreMethod = Literal["pseudo-ppl", "one-pass"]

LONGEST_RESIDUES = 16384
"""Longest sequence taken by models whose positions set no limit of their own."""


class Engine:
    """One model on one device. Safe to call from several threads."""

    def __init__(
        self, model: Esm, lineage: dict[str, Any], device: torch.device, max_batch_tokens: int
    ) -> None:
        self.model = model
        self.lineage = lineage
        """Where the weights come from, as the bundle's raptide.json says; {} for strangers'."""
        self.max_batch_tokens = max_batch_tokens
        self._device = device
        self._alphabet = model.settings.alphabet

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        max_batch_tokens: int = 4096,
    ) -> Engine:
        """Load a bundle.

        Args:
            folder: a model folder: raptide's, or one that transformers wrote for ESM-1b or ESM-2.
            device: "auto" takes the first GPU where there is one.
            dtype: "auto" takes bf16 on GPUs and on CPUs with AMX tiles, fp32 elsewhere.
            max_batch_tokens: tokens in one forward pass; a longer sequence goes alone.

        Raises:
            BundleError: the folder is no such model.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(device)
        if dtype == "auto":
            fast_bf16 = target.type == "cuda" or torch.cpu._is_amx_tile_supported()
            dtype = "bf16" if fast_bf16 else "fp32"
        model, lineage = load_bundle(folder)
        model = model.to(target, torch.bfloat16 if dtype == "bf16" else torch.float32)
        return cls(model, lineage, target, max_batch_tokens)

    @property
    def width(self) -> int:
        """Values in one embedding."""
        return self.model.settings.width

    @property
    def max_residues(self) -> int:
        """Residues of the longest sequence that is taken."""
        limit = self.model.settings.max_tokens
        return limit - self._alphabet.num_specials if limit else LONGEST_RESIDUES

    @property
    def dtype(self) -> str:
        return "bf16" if self.model.embed.weight.dtype == torch.bfloat16 else "fp32"

    def embed(
        self, sequences: Sequence[str], layers: Sequence[int] = (-1,), pooling: Pooling = "mean"
    ) -> np.ndarray | list[np.ndarray]:
        """Representations of each sequence, fp32.

        Args:
            layers: 0 is the embedding, i the output of layer i; negative counts from the last.
            pooling: "mean" over the residues (specials left out), "bos" the first token, "residue"
                one vector a residue.

        Returns:
            [n, D] for one layer, [n, layers, D] for several; with pooling "residue" a list of
            [L, D] or [layers, L, D], one per sequence.

        Raises:
            SequenceError: a sequence is empty, too long or holds something that is no residue.
            ConfigError: the model has no such layer.
        """
        wanted = [self._layer(layer) for layer in layers]
        tokens = self._tokenise(sequences)
        results: list[Any] = [None] * len(tokens)
        for indices, packed in self._batches(tokens):
            with torch.inference_mode():
                stacked = torch.stack(self.model.represent(packed, wanted), 1)
            for index, piece_LND in zip(indices, stacked.split(packed.lengths), strict=True):
                pooled = _pool(piece_LND, pooling, self._alphabet.append_eos)
                results[index] = pooled[0] if len(wanted) == 1 else pooled
        if pooling == "residue":
            return results
        shape = (0, self.width) if len(wanted) == 1 else (0, len(wanted), self.width)
        return np.stack(results) if results else np.empty(shape, np.float32)

    def score_sequences(
        self, sequences: Sequence[str], method: ScoreMethod = "pseudo-ppl"
    ) -> np.ndarray:
        """Mean log likelihood of each sequence's residues in nats, [n] float64; higher is likelier.

        "pseudo-ppl" masks one residue at a time (Salazar et al., 2020): exp(-score) is the pseudo
        perplexity. It costs a forward pass of the whole sequence per residue. "one-pass" reads all
        likelihoods off a single unmasked pass: cheap, and optimistic.

        Raises:
            SequenceError: as in `embed`.
        """
        tokens = self._tokenise(sequences)
        if method == "one-pass":
            return self._score_in_one_pass(tokens)
        return np.array([self._score_by_masking(each) for each in tokens], np.float64)

    def _score_in_one_pass(self, tokens: list[torch.Tensor]) -> np.ndarray:
        scores = np.zeros(len(tokens))
        for indices, packed in self._batches(tokens):
            with torch.inference_mode():
                log_p = torch.log_softmax(self.model(packed).float(), -1)
            true = log_p.gather(1, packed.tokens_T[:, None])[:, 0]
            for index, piece in zip(indices, true.split(packed.lengths), strict=True):
                inner = piece[1:-1] if self._alphabet.append_eos else piece[1:]
                scores[index] = inner.double().mean().item()
        return scores

    def _score_by_masking(self, tokens: torch.Tensor) -> float:
        """Each residue masked in a copy of its own; copies share batches."""
        end = len(tokens) - (1 if self._alphabet.append_eos else 0)
        copies = max(1, self.max_batch_tokens // len(tokens))
        total = 0.0
        for positions in torch.arange(1, end).split(copies):
            rows = tokens.repeat(len(positions), 1)
            at = torch.arange(len(positions))
            rows[at, positions] = self._alphabet.mask
            packed = self._pack(list(rows))
            with torch.inference_mode():
                (final_TD,) = self.model.represent(packed, [self.model.settings.layers])
                masked = final_TD[(at * len(tokens) + positions).to(self._device)]
                log_p = torch.log_softmax(self.model.predict(masked).float(), -1).cpu()
            total += log_p[at, tokens[positions]].double().sum().item()
        return total / (end - 1)

    def _tokenise(self, sequences: Sequence[str]) -> list[torch.Tensor]:
        if isinstance(sequences, str):
            raise SequenceError(
                "A list of sequences is needed, but one string was given: use [it]."
            )
        return [self._tokens(sequence, index) for index, sequence in enumerate(sequences)]

    def _tokens(self, sequence: str, index: int) -> torch.Tensor:
        """One sequence with its specials, [L + specials] int64."""
        try:
            residues = encode_residues(sequence)
        except SequenceError as error:
            raise SequenceError(f"Sequence {index}: {error}") from None
        if len(residues) > self.max_residues:
            raise SequenceError(
                f"Sequence {index}: this model takes at most {self.max_residues} residues, but "
                f"{len(residues)} were given; cut it into domains."
            )
        return torch.from_numpy(self._alphabet.add_specials(residues).astype(np.int64))

    def _layer(self, layer: int) -> int:
        last = self.model.settings.layers
        index = layer + last + 1 if layer < 0 else layer
        if not 0 <= index <= last:
            raise ConfigError(
                f"This model has layers 0 to {last} (or -1 to {-last - 1}), but layer {layer} was "
                "asked for."
            )
        return index

    def _batches(self, tokens: list[torch.Tensor]) -> Iterator[tuple[list[int], Packed]]:
        for indices in plan_batches([len(each) for each in tokens], self.max_batch_tokens):
            yield indices, self._pack([tokens[index] for index in indices])

    def _pack(self, pieces: list[torch.Tensor]) -> Packed:
        lengths = tuple(len(piece) for piece in pieces)
        return Packed(torch.cat(pieces).to(self._device, non_blocking=True), lengths)


def _pool(piece_LND: torch.Tensor, pooling: Pooling, append_eos: bool) -> np.ndarray:
    """[tokens, layers, D] with specials to [layers, D], or [layers, residues, D] unpooled."""
    if pooling == "bos":
        pooled = piece_LND[0]
    else:
        inner = piece_LND[1:-1] if append_eos else piece_LND[1:]
        pooled = inner.float().mean(0) if pooling == "mean" else inner.transpose(0, 1)
    return pooled.float().cpu().numpy()
