"""What the endpoint does, free of any transport: HTTP (api.py) and gRPC (rpc.py) call it.

A request's sequences are checked, cut into runs of about one batch, sent to replicas side by side
(a bounded number at a time) and come back in order, as `Done` messages with the index of their
first sequence. So one large request spreads over batches and replicas, and leaves room for others.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from ray.serve.handle import DeploymentHandle

from raptide.alphabet import decode_residues, encode_residues
from raptide.calls.scoring import score_mutants
from raptide.errors import SequenceError
from serve.calls import Ask, Description, Done, Work
from serve.gateway.asked import check_positions, costs_of, mutants
from serve.gateway.dispatch import Dispatcher, VersionGone
from serve.gateway.fair import FairUse, News
from serve.gateway.keys import Key
from serve.gateway.ledger import Lease, Ledger
from serve.gateway.refusals import gone, invalid, updated
from serve.gateway.runs import Lead, in_order
from serve.gateway.sizes import (
    BYTES,
    Encoding,
    Shapes,
    ahead_bytes,
    check_layer_count,
    check_layers_differ,
    check_size,
    count_numbers,
    cut_runs,
)
from serve.gateway.standing import Standing
from serve.gateway.terms import LONGEST_ID
from serve.metrics import GatewayMetrics
from serve.settings import GatewaySettings, ModelSettings

DESCRIBE_S = 30.0
"""How long a model may take to say what it is: with no replica, one has to load first."""

DIGEST = re.compile(r"[0-9a-f]{16}")
"""Weights, as answers name them."""


@dataclass
class Query:
    """One request, checked."""

    model: str
    ask: Ask
    sequences: list[str]
    """Plain capitals."""
    costs: list[int]
    """Tokens to compute for each sequence."""
    param: str
    """The field the sequences came in."""
    deadline: float
    timeout_s: float
    request_id: str = ""
    variants: list[str] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    """To mask in turn, of each sequence, for the call "masked"."""
    relative: bool = False
    """Whether the first sequence is the wild type, and the answers are to be relative to it."""
    weights: str = ""
    """The digest of the only weights the client wants; empty where any will do."""
    key: Key | None = None
    """Whose it is, once it was let in."""
    answer_bytes: list[int] = field(default_factory=list)
    """What the arrays of each sequence take in memory; filled in by `Service.weigh`."""

    @property
    def residues(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def charge(self) -> dict[str, int]:
        """By the unit of a rate."""
        return {"residues": self.residues, "tokens": sum(self.costs)}


@dataclass
class Whole:
    """All answers to one request."""

    arrays: list[np.ndarray]
    weights: str
    step: int | None
    queue_s: float
    compute_s: float


class Service:
    """The models of one endpoint, as one gateway sees them."""

    def __init__(
        self,
        settings: GatewaySettings,
        models: list[ModelSettings],
        handles: dict[str, DeploymentHandle],
        tell: Callable[[News], Awaitable[None]] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = GatewayMetrics()
        self._models = {model.name: model for model in models}
        self._dispatchers = {
            name: Dispatcher(handle, self._count_retry, cold=self._models[name].is_cold)
            for name, handle in handles.items()
        }
        self.fair = FairUse(settings, tell)
        self._shapes = Shapes(
            lambda name, allowed_s: self._dispatchers[name].describe(allowed_s),
            settings.timeout_s,
            cold={model.name for model in models if model.is_cold},
        )
        self._ledger = Ledger(settings.max_held_bytes)
        self.standing = Standing(models, self._dispatchers)

    async def describe(self, name: str) -> Description:
        """What a model is and where its weights come from, as one of its replicas says."""
        return await self._dispatchers[name].describe(DESCRIBE_S)

    def name_of(self, model: str | None) -> str:
        """The name of a model, the first by default.

        Raises:
            Refusal: there is none such.
        """
        return self._choose(model).name

    async def refuse_other_width(self, model: str | None, width: int) -> None:
        """Raises Refusal where a model's vectors have another number of values."""
        name = self.name_of(model)
        until = time.monotonic() + DESCRIBE_S
        own = (await self._shapes.of(name, DESCRIBE_S, until)).width
        if width != own:
            raise invalid(
                "dimensions",
                f"Vectors of {name} have {own} values and are never cut, but {width} were asked "
                f"for; leave `dimensions` out, or give {own}.",
            )

    def query(
        self,
        model: str | None,
        ask: Ask,
        given: str | list[str],
        param: str,
        *,
        timeout_s: float | None = None,
        variants: list[str] | None = None,
        positions: list[list[int]] | None = None,
        request_id: str = "",
        weights: str = "",
    ) -> Query:
        """Check a request.

        Raises:
            Refusal: a rule is broken; the message names the first bad sequence.
        """
        started = time.monotonic()
        self.fair.refuse_if_stopping()
        chosen = self._choose(model)
        if weights and not DIGEST.fullmatch(weights):
            raise invalid(
                "X-Raptide-Weights",
                "Weights are named by 16 hex digits, as answers do in X-Raptide-Weights, but "
                f"{weights[:40]!r} was given.",
            )
        check_layer_count(ask.layers)
        sequences = self._read(given, param)
        relative = False
        if variants is not None:
            self._check_count(variants, "variants", "variants")
            if ask.method == "pseudo-ppl":  # a comparison of whole sequences
                sequences, variants = mutants(sequences[0], variants), None
                ask, relative = Ask("score", "pseudo-ppl"), True
        if positions is not None:
            check_positions(positions, sequences)
        costs = costs_of(ask, sequences, variants or [], positions or [])
        _refuse_too_dear(chosen, sum(costs), param)
        allowed_s = min(timeout_s or math.inf, self.settings.timeout_s)
        self.metrics.tokenise.observe(max(time.monotonic() - started, 1e-6))
        return Query(
            chosen.name,
            ask,
            sequences,
            costs,
            param,
            started + allowed_s,
            allowed_s,
            request_id[:LONGEST_ID],
            variants or [],
            positions or [],
            relative,
            weights,
        )

    def admit(self, key: Key | None, query: Query) -> None:
        """Count a request against its key.

        Raises:
            Refusal: the key may not have it, or not now.
        """
        query.key = key
        self.fair.admit(key, query.model, query.charge)

    async def weigh(self, query: Query, encoding: Encoding) -> None:
        """Find out how large the answer will be.

        Raises:
            Refusal: too large, a layer is named twice, or no replica says what the model is.
        """
        shape = await self._shapes.of(query.model, query.timeout_s, query.deadline)
        check_layers_differ(query.ask.layers, shape)
        lengths = [len(each) for each in query.positions or query.sequences]
        counts = count_numbers(query.ask, lengths, len(query.variants), shape)
        rows = max(len(counts), len(query.variants))
        check_size(sum(counts), rows, encoding, query.param, self.settings)
        query.answer_bytes = [BYTES * count for count in counts]

    async def hold(self, query: Query, *, streamed: bool) -> Lease:
        """Room in memory for the answer, which must be given back.

        Args:
            streamed: it is sent as it is computed, and never held as a whole.

        Raises:
            Refusal: there is none before the deadline.
        """
        needed = ahead_bytes(query.answer_bytes) if streamed else sum(query.answer_bytes)
        with self.fair.answering(query.key, query.charge):
            return await self._ledger.hold(needed, query.deadline)

    async def gather(self, query: Query) -> Whole:
        """All answers, from one version of the weights; begun again where that version goes.

        Raises:
            Refusal: there are none, and why.
        """
        with self.fair.answering(query.key, query.charge):
            parts = await self._parts(query)
        arrays = [array for part in parts for array in part.arrays]
        if query.relative:
            arrays = [score_mutants(list(map(float, arrays)), len(query.sequences[0]))]
        return Whole(
            arrays,
            parts[0].weights,
            parts[0].step,
            max(part.queue_s for part in parts),
            max(part.compute_s for part in parts),
        )

    async def _parts(self, query: Query) -> list[Done]:
        while True:
            try:
                return [part async for part in self._answers(query)]
            except VersionGone as version:
                self._begin_again(query, version)

    async def stream(self, query: Query) -> AsyncIterator[Done]:
        """The answers run by run, in order, all from one version of the weights.

        Raises:
            Refusal: there are none, or no more as that version has gone; and why.
        """
        told = False
        with self.fair.answering(query.key, query.charge):
            while True:
                try:
                    async with aclosing(self._answers(query)) as parts:
                        async for part in parts:
                            told = True
                            yield part
                    return
                except VersionGone as version:
                    self._begin_again(query, version)
                    if told:
                        raise updated() from None

    def _begin_again(self, query: Query, version: VersionGone) -> None:
        """Raises Refusal where the client wants that version and no other."""
        if query.weights:
            raise gone(query.weights, version.served) from None
        self._count_retry("update")

    def _answers(self, query: Query) -> AsyncGenerator[Done, None]:
        """The answers run by run, in order, as `runs.in_order` gives them."""
        budget = self._models[query.model].max_batch_tokens
        runs, at_once = cut_runs(query.costs, query.answer_bytes, budget)
        return in_order(runs, partial(self._run, query), query.weights, at_once)

    async def _run(self, query: Query, run: slice, lead: Lead) -> Done:
        work = Work(
            query.ask,
            query.sequences[run],
            sum(query.costs[run]),
            query.timeout_s,
            query.request_id,
            query.variants,
            query.positions[run],
            lead.weights,
            lead.is_asked_for,
            lead.is_taken,
        )
        done = await self._dispatchers[query.model].run(
            work, query.deadline, query.param, run.start, lead.take
        )
        self._shapes.saw(query.model, done.weights)
        return done

    def _count_retry(self, reason: str) -> None:
        self.metrics.retries.inc(tags={"reason": reason})

    def _choose(self, name: str | None) -> ModelSettings:
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            known = ", ".join(map(repr, self._models))
            raise invalid(
                "model", f"This endpoint serves {known}, but {name[:100]!r} was asked for.", 404
            )
        return self._models[name]

    def _read(self, given: str | list[str], param: str) -> list[str]:
        """Sequences in plain capitals."""
        sequences = [given] if isinstance(given, str) else given
        self._check_count(sequences, param, "sequences")
        plain = []
        for index, sequence in enumerate(sequences):
            place = "" if param == "sequence" else f"Sequence {index}: "
            try:
                plain.append(decode_residues(encode_residues(sequence)))
            except SequenceError as error:
                raise invalid(param, f"{place}{error}") from None
            if (residues := len(plain[-1])) > self.settings.max_residues:
                raise invalid(
                    param,
                    f"{place}at most {self.settings.max_residues} residues are taken, but "
                    f"{residues} were given; cut it into domains.",
                )
        return plain

    def _check_count(self, given: list[str], param: str, noun: str) -> None:
        if not given:
            raise invalid(param, f"`{param}` needs at least one of its {noun}, but it is empty.")
        if len(given) > self.settings.max_sequences:
            raise invalid(
                param,
                f"`{param}` takes at most {self.settings.max_sequences} {noun}, but {len(given)} "
                "were given; send them in several requests.",
            )


def _refuse_too_dear(model: ModelSettings, cost: int, param: str) -> None:
    """Raises Refusal where a request alone takes more tokens than may wait."""
    if cost > model.max_queued_tokens:
        raise invalid(
            param,
            f"`{param}` would take {cost:,} tokens to compute, more than the "
            f"{model.max_queued_tokens:,} that may wait; send fewer or shorter sequences.",
        )
