"""What the endpoint does, free of any transport: HTTP (api.py) and gRPC (rpc.py) call it.

A request's sequences are checked, cut into runs of about one batch, sent to replicas side by side
(a bounded number at a time) and come back in order, as `Done` messages with the index of their
first sequence. So one large request spreads over batches and replicas, and leaves room for others.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
from ray.serve.handle import DeploymentHandle

from raptide.alphabet import decode_residues, encode_residues
from raptide.errors import SequenceError
from raptide.inference.variants import apply_variant, parse_variant
from serve.calls import Ask, Description, Done, Work, cut, positions_of
from serve.gateway.cache import Cache, cache_key
from serve.gateway.dispatch import Dispatcher, VersionGone
from serve.gateway.fair import FairUse, News
from serve.gateway.keys import Key
from serve.gateway.refusals import gone, invalid, updated
from serve.gateway.runs import Lead, in_order
from serve.metrics import GatewayMetrics
from serve.settings import GatewaySettings, ModelSettings

DESCRIBE_S = 30.0
"""How long a model may take to say what it is: with no replica, one has to load first."""

LEARN_S = 5.0
"""How long after an update the cache may answer for the weights before it."""

PROBED_S = 2.0
"""How long a probe's outcome holds."""

MOST_LAYERS = 256

DIGEST = re.compile(r"[0-9a-f]{16}")
"""Weights, as answers name them."""


@dataclass
class Query:
    """One request, checked."""

    model: str
    ask: Ask
    sequences: list[str]
    """Plain capitals."""
    param: str
    """The field the sequences came in."""
    deadline: float
    timeout_s: float
    request_id: str = ""
    variants: list[str] = field(default_factory=list)
    relative: bool = False
    """Whether the first sequence is the wild type, and the answers are to be relative to it."""
    weights: str = ""
    """The digest of the only weights the client wants; empty where any will do."""
    cost: int = 0
    """Tokens to compute."""
    key: Key | None = None
    """Whose it is, once it was let in."""

    @property
    def residues(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def costs(self) -> dict[str, int]:
        """By the unit of a rate."""
        return {"residues": self.residues, "tokens": self.cost}


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
        self._cache = Cache(settings.cache_bytes)
        self._newest: dict[str, tuple[str, float]] = {}
        """The weights each model answered with last, and when."""
        self.fair = FairUse(settings, tell)
        self._probed: asyncio.Future[None] | None = None
        self._probed_at = 0.0

    @property
    def names(self) -> list[str]:
        return list(self._models)

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
        own = (await self.describe(name))["width"]
        if width != own:
            raise invalid(
                "dimensions",
                f"Vectors of {name} have {own} values and are never cut, but {width} were asked "
                f"for; leave `dimensions` out, or give {own}.",
            )

    async def probe(self, timeout_s: float) -> None:
        """Every model that always has a replica has just computed something, past its queue.

        Whoever asks within PROBED_S shares one computation: probes take no key.
        """
        self.fair.refuse_if_stopping()
        now = time.monotonic()
        probed = self._probed
        if probed is None or (probed.done() and now - self._probed_at > PROBED_S):
            self._probed_at = now
            probed = self._probed = asyncio.ensure_future(self._probe(timeout_s))
        await asyncio.shield(probed)

    async def _probe(self, timeout_s: float) -> None:
        always = [m for m in self._models.values() if m.max_replicas is None or m.min_replicas]
        await asyncio.gather(*(self._dispatchers[m.name].probe(timeout_s) for m in always))

    def query(
        self,
        model: str | None,
        ask: Ask,
        given: str | list[str],
        param: str,
        *,
        timeout_s: float | None = None,
        variants: list[str] | None = None,
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
        if len(set(ask.layers)) < len(ask.layers) or len(ask.layers) > MOST_LAYERS:
            raise invalid(
                "layers",
                f"`layers` names each layer once, and at most {MOST_LAYERS}, but "
                f"{len(ask.layers):,} were given, {len(set(ask.layers)):,} of them different.",
            )
        sequences = self._read(given, param)
        relative = False
        if variants is not None:
            self._check_count(variants, "variants", "variants")
            if ask.method == "pseudo-ppl":  # a comparison of whole sequences
                sequences, variants = _mutants(sequences[0], variants), None
                ask, relative = Ask("score", "pseudo-ppl"), True
        cost = self._check_cost(chosen, ask, sequences, param, variants or [])
        allowed_s = min(timeout_s or math.inf, self.settings.timeout_s)
        self.metrics.tokenise.observe(max(time.monotonic() - started, 1e-6))
        return Query(
            chosen.name,
            ask,
            sequences,
            param,
            started + allowed_s,
            allowed_s,
            request_id,
            variants or [],
            relative,
            weights,
            cost,
        )

    def admit(self, key: Key | None, query: Query) -> None:
        """Count a request against its key.

        Raises:
            Refusal: the key may not have it, or not now.
        """
        query.key = key
        self.fair.admit(key, query.model, query.costs)

    async def gather(self, query: Query) -> Whole:
        """All answers, from one version of the weights; begun again where that version goes.

        Raises:
            Refusal: there are none, and why.
        """
        with self.fair.answering(query.key, query.costs):
            parts = await self._parts(query)
        arrays = [array for part in parts for array in part.arrays]
        if query.relative:
            totals = np.array(arrays) * [len(sequence) for sequence in query.sequences]
            arrays = [totals[1:] - totals[0]]
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
        with self.fair.answering(query.key, query.costs):
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
        costs = [query.ask.tokens(len(sequence)) for sequence in query.sequences]
        runs = list(cut(costs, self._models[query.model].max_batch_tokens))
        return in_order(
            runs, lambda run, lead: self._run(query, run, sum(costs[run]), lead), query.weights
        )

    async def _run(self, query: Query, run: slice, tokens: int, lead: Lead) -> Done:
        sequences = query.sequences[run]
        if query.variants:
            tokens = query.ask.tokens(len(sequences[0]), positions_of(query.variants))
        key = None
        if self._cache.max_bytes and len(query.sequences) == 1:
            newest, when = self._newest.get(query.model, ("", 0.0))
            key = cache_key(query.model, newest, query.ask, sequences[0], query.variants)
            fresh = time.monotonic() - when < LEARN_S
            kept = self._cache.get(key) if fresh and query.weights in ("", newest) else None
            self.metrics.cache.inc(tags={"result": "hit" if kept else "miss"})
            if kept is not None:
                return kept
        work = Work(
            query.ask,
            sequences,
            tokens,
            query.timeout_s,
            query.request_id,
            query.variants,
            lead.weights,
            lead.is_asked_for,
            lead.is_taken,
        )
        done = await self._dispatchers[query.model].run(
            work, query.deadline, query.param, run.start, lead.take
        )
        if self._cache.max_bytes:
            self._keep(query, key, done)
        return done

    def _keep(self, query: Query, key: bytes | None, done: Done) -> None:
        """Remember an answer under the weights it came from, and that these are the newest."""
        before, _ = self._newest.get(query.model, ("", 0.0))
        self._newest[query.model] = (done.weights, time.monotonic())
        if key is not None and before == done.weights:
            self._cache.put(key, done)
            self.metrics.cache_bytes.set(self._cache.held_bytes)

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

    def _check_cost(
        self, model: ModelSettings, ask: Ask, sequences: list[str], param: str, variants: list[str]
    ) -> int:
        positions = positions_of(variants) if variants else None
        cost = sum(ask.tokens(len(sequence), positions) for sequence in sequences)
        if cost > model.max_queued_tokens:
            raise invalid(
                param,
                f"`{param}` would take {cost:,} tokens to compute, more than the "
                f"{model.max_queued_tokens:,} that may wait; send fewer or shorter sequences.",
            )
        return cost


def _mutants(sequence: str, variants: list[str]) -> list[str]:
    """The wild type, and what each variant makes of it."""
    residues = encode_residues(sequence)
    try:
        changed = [apply_variant(residues, parse_variant(each, residues)) for each in variants]
    except SequenceError as error:
        raise invalid("variants", str(error)) from None
    return [sequence, *map(decode_residues, changed)]
