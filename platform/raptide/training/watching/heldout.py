"""Held-out ECE: the same masked residues every time, and the baselines on them.

ECE is exp of the mean negative log likelihood (nats) of the chosen residues, softmax over the whole
vocabulary (Rives et al., 2021): 1 is perfect, 25 is uniform over the residue letters.

A tenth of the chosen residues stay as they are, and a model soon learns to copy what it sees: that
alone takes the ECE of all chosen residues from 17.3 to about 14.9. It is measured a second time on
the residues that were shown as `<mask>`, where nothing can be copied; so is the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from raptide.alphabet import ALPHABETS, Alphabet, count_letters
from raptide.data.streaming.batch import PackedRows
from raptide.data.streaming.letters import count_training
from raptide.data.streaming.rows import pack_block
from raptide.data.streaming.stream import StreamPlan
from raptide.errors import CorpusError
from raptide.model.packed import Packed
from raptide.training.batches import micro_batches, share_bounds
from raptide.training.planning.recipe import EvaluationSettings

UNIFORM_ECE = 25.0


@dataclass(frozen=True)
class Ece:
    """Held-out ECE of a model or a baseline."""

    all_chosen: float
    """Over all chosen residues, as in the paper."""

    masked_only: float
    """Over those shown as `<mask>`."""

    @classmethod
    def of_sums(cls, nats: Sequence[float], targets: Sequence[float]) -> Ece:
        """From the summed nats and the number of residues, of all chosen and of the masked."""
        return cls(*(_ece(n / max(t, 1)) for n, t in zip(nats, targets, strict=True)))


MOST_NATS = 700.0
"""A model so bad that its ECE is no float any more still has one: exp of this, about 1e304."""


LARGEST = torch.finfo(torch.float32).max


def _ece(mean_nats: float) -> float:
    return math.exp(min(mean_nats, MOST_NATS))


LENGTHS = (128, 256, 512)
"""Residues up to which a protein, or a crop of one, belongs to a bucket; the last is open."""


MASKED = 0.15
"""Share of the held-out residues that is asked for, whatever share a recipe trains on."""

BenchValue = tuple[float, float, float, bool]
"""A number with the interval that it lies in, and whether higher is better."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    ece: Ece

    accuracy: float
    """Share of the residues shown as `<mask>` whose letter was the most likely."""

    by_length: dict[str, float]
    """ECE of all chosen residues in proteins of each length, such as `129-256`, in residues."""

    bench: dict[str, BenchValue] = field(default_factory=dict)
    """Main metrics of a benchmark, such as `contacts/p@l/long`."""

    bench_problem: str = ""
    """Why there are none although a benchmark was asked."""

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        return {
            "eval/ece": self.ece.all_chosen,
            "eval/ece_masked": self.ece.masked_only,
            "eval/accuracy_masked": self.accuracy,
            **{f"eval/ece_length/{name}": ece for name, ece in self.by_length.items()},
            **{f"bench/{name}": value for name, (value, *_) in self.bench.items()},
        }


@dataclass(frozen=True)
class Evaluations:
    """What the evaluations of a run have come to; travels in the checkpoint."""

    last: Ece | None = None
    step: int = 0
    """When that was measured."""

    best: float | None = None
    """Lowest ECE of all chosen residues so far."""

    since_best: int = 0
    """Evaluations since then."""

    best_masked: float | None = None
    """Lowest ECE on `<mask>` so far."""

    failed: int = 0
    """Evaluations beside the training that came to nothing."""

    bench_best: dict[str, list[float]] = field(default_factory=dict)
    """Of each of a benchmark's metrics the best value yet, the end of its interval on the worse
    side, and the ECE of that checkpoint."""

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any]) -> Evaluations:
        ece = manifest["heldout_ece"]
        return cls(
            last=None if ece is None else Ece(**ece),
            step=manifest["heldout_step"],
            best=manifest["heldout_best"],
            since_best=manifest["heldout_since_best"],
            best_masked=manifest.get("heldout_best_masked"),
            failed=manifest.get("heldout_failed", 0),
            bench_best=manifest.get("bench_best", {}),
        )

    def to_manifest(self) -> dict[str, Any]:
        return {
            "heldout_ece": asdict(self.last) if self.last else None,
            "heldout_step": self.step,
            "heldout_best": self.best,
            "heldout_since_best": self.since_best,
            "heldout_best_masked": self.best_masked,
            "heldout_failed": self.failed,
            "bench_best": self.bench_best,
        }

    def collapses(self, evaluation: Evaluation) -> list[str]:
        """What has become worse than it was while the loss has not: a sentence each.

        Worse is a value whose whole interval lies on the worse side of the best one's.
        """
        sentences = []
        for name, (value, low, high, higher) in evaluation.bench.items():
            best, bound, ece = self.bench_best.get(name, (value, value, 0.0))
            fell = high < bound if higher else low > bound
            if fell and evaluation.ece.all_chosen <= ece:
                sentences.append(
                    f"{name} has become worse ({best:.3f} to {value:.3f}) while the held-out ECE "
                    f"has not ({ece:.3f} to {evaluation.ece.all_chosen:.3f}); the loss alone does "
                    "not show it, look at the curves under bench/."
                )
        return sentences

    def after(self, ece: Ece, step: int, bench: dict[str, BenchValue] | None = None) -> Evaluations:
        """With one evaluation more."""
        best = dict(self.bench_best)
        for name, (value, low, high, higher) in (bench or {}).items():
            if math.isnan(value):
                continue
            if name not in best or (value > best[name][0]) == higher:
                best[name] = [value, low if higher else high, ece.all_chosen]
        return replace(self._after(ece, step), bench_best=best)

    def _after(self, ece: Ece, step: int) -> Evaluations:
        masked = min(ece.masked_only, self.best_masked or math.inf)
        now = replace(self, last=ece, step=step, best_masked=masked)
        if self.best is None or ece.all_chosen < self.best:
            return replace(now, best=ece.all_chosen, since_best=0)
        return replace(now, since_best=self.since_best + 1)

    def after_failure(self) -> Evaluations:
        """With one evaluation more that came to nothing."""
        return replace(self, failed=self.failed + 1)

    def is_over(self, settings: EvaluationSettings) -> bool:
        """Whether the run should end: it is where it was to come, or improves no more."""
        patience, goal = settings.patience, settings.until_ece_masked
        if goal is not None and self.best_masked is not None and self.best_masked <= goal:
            return True
        return patience is not None and self.since_best >= patience


def heldout_rows(plan: StreamPlan, settings: EvaluationSettings) -> PackedRows:
    """Packed rows of the representatives of held-out clusters, from a fixed number of blocks.

    Raises:
        CorpusError: a corpus holds nothing out.
    """
    asked = {"sampling": "representatives", "mask_fraction": MASKED}
    rows = plan.settings.model_copy(update=asked)
    alphabet = ALPHABETS[plan.alphabet]
    packed = []
    for source in plan.sources:
        corpus = source.open()
        blocks = corpus.blocks("heldout")[: settings.blocks]
        if not blocks:
            raise CorpusError(
                f"{source.path} has no held-out clusters to evaluate on; build it again with a "
                "larger --holdout-fraction."
            )
        packed += [
            pack_block(corpus.read_block(block), rows, alphabet, settings.seed, 0, index)
            for index, block in enumerate(blocks)
        ]
    return PackedRows(
        np.concatenate([part.tokens for part in packed]),
        np.concatenate([part.targets for part in packed]),
        [segments for part in packed for segments in part.segments],
    )


class HeldoutEvaluator:
    """Measures held-out ECE, with each of several workers on its share of the rows or alone."""

    def __init__(
        self,
        rows: PackedRows,
        plan: StreamPlan,
        micro_rows: int,
        rank: int = 0,
        workers: int = 1,
        *,
        blind: bool = False,
    ) -> None:
        """
        Args:
            blind: the model does not see what it predicts, so it is shown the true residues and
                asked for the same ones as any other.
        """
        accumulation = -(-len(rows.tokens) // (workers * micro_rows))
        self._rows, self._workers, self._blind = rows, workers, blind
        self._alphabet = ALPHABETS[plan.alphabet]
        self._bounds = share_bounds(len(rows.tokens), rank, workers, micro_rows, accumulation)

    def measure(self, model: Any, device: torch.device) -> Evaluation:
        """Evaluate a model or a DeepSpeed engine; every rank calls it and gets the same numbers."""
        model.eval()
        # Of all chosen, of the masked, of each length: targets and nats; and the right ones.
        sums = torch.zeros(2, 3 + len(LENGTHS), dtype=torch.float64, device=device)
        right = torch.zeros(1, dtype=torch.float64, device=device)
        with torch.no_grad():
            for micro in micro_batches(self._rows, self._bounds, self._alphabet, device):
                at, targets = micro.targets.at_N, micro.targets.true_N
                shown = micro.uncovered() if self._blind else micro
                logits = model(shown.packed)[at].float()
                nats = cross_entropy(logits, targets, reduction="none").double()
                nats = nats.clamp(max=LARGEST)  # infinite ones times 0 would be no number
                masked = micro.packed.tokens_T[at] == self._alphabet.mask
                groups = torch.stack(
                    [
                        torch.ones_like(masked),
                        masked,
                        *_in_buckets(micro.packed, self._alphabet)[:, at],
                    ]
                ).double()
                sums += torch.stack([groups.sum(1), groups @ nats])
                right += ((logits.argmax(-1) == targets) & masked).sum()
        model.train()
        if self._workers > 1:
            dist.all_reduce(sums)
            dist.all_reduce(right)
        targets, nats = sums.tolist()
        return Evaluation(
            ece=Ece.of_sums(nats[:2], targets[:2]),
            accuracy=right.item() / max(targets[1], 1),
            by_length={
                name: _ece(n / t)
                for name, n, t in zip(bucket_names(), nats[2:], targets[2:], strict=True)
                if t
            },
        )


def _in_buckets(packed: Packed, alphabet: Alphabet) -> torch.Tensor:
    """Which length bucket each token's sequence belongs to, [buckets, T] bool."""
    limits = torch.tensor(LENGTHS, device=packed.tokens_T.device) + alphabet.num_specials
    bucket_T = torch.bucketize(packed.lengths_B, limits)[packed.sequence_T]
    return bucket_T == torch.arange(len(LENGTHS) + 1, device=bucket_T.device)[:, None]


def bucket_names() -> list[str]:
    """Names of the length buckets, in order."""
    starts = [1, *(limit + 1 for limit in LENGTHS)]
    closed = [f"{a}-{b}" for a, b in zip(starts, LENGTHS, strict=False)]
    return [*closed, f"{starts[-1]}-"]


def unigram_ece(plan: StreamPlan, rows: PackedRows) -> Ece:
    """ECE of predicting each held-out target by its letter's share of the training residues.

    The training split is counted under the sampling in use (epoch 0), and several corpora are added
    up by their weights; one is added to each letter's count, so that a letter unseen in training is
    not impossible.
    """
    seen = [count_training(plan, index) + 1 for index in range(len(plan.sources))]
    weights = [source.weight for source in plan.sources]
    shares = np.array(weights) @ [counts / counts.sum() for counts in seen] / sum(weights)
    nats = -np.log(shares)
    masked = rows.tokens == ALPHABETS[plan.alphabet].mask
    asked = [count_letters(rows.targets), count_letters(rows.targets[masked])]
    return Ece.of_sums([float(each @ nats) for each in asked], [each.sum() for each in asked])
