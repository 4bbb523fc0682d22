"""What the endpoint does, free of any transport: HTTP (api.py) and gRPC (rpc.py) call it.

A request's sequences are checked, cut into runs of about one batch, sent to replicas side by side
(a bounded number at a time) and come back in order, as `Done` messages with the index of their
first sequence. So one large request spreads over batches and replicas, and leaves room for others.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np
from ray.serve.handle import DeploymentHandle

from raptide.alphabet import decode_residues, encode_residues
from raptide.calls.variants import apply_variant, parse_variant
from raptide.errors import SequenceError
from serve.calls import Ask, Description, Done, Work, positions_of
from serve.gateway.dispatch import Dispatcher
from serve.gateway.keys import Key, Rate
from serve.gateway.ledger import Lease, Ledger
from serve.gateway.refusals import Refusal, invalid, overloaded
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
from serve.metrics import GatewayMetrics
from serve.settings import GatewaySettings, ModelSettings

DESCRIBE_S = 30.0
"""How long a model may take to say what it is: with no replica, one has to load first."""

LONGEST_ID = 128
"""Characters of a request's id that are kept; a client may send any number."""

ATTEMPTS = 5
"""How often a request is begun again because an update came between its runs."""


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
    positions: list[list[int]] = field(default_factory=list)
    """To mask in turn, of each sequence, for the call "masked"."""
    relative: bool = False
    """Whether the first sequence is the wild type, and the answers are to be relative to it."""
    answer_bytes: list[int] = field(default_factory=list)
    """What the arrays of each sequence take in memory; filled in by `Service.weigh`."""

    @property
    def residues(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def costs(self) -> list[int]:
        """Tokens to compute for each sequence."""
        return costs_of(self.ask, self.sequences, self.positions)


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
    ) -> None:
        self.settings = settings
        self.metrics = GatewayMetrics()
        self._models = {model.name: model for model in models}
        self._dispatchers = {
            name: Dispatcher(handle, self._count_retry) for name, handle in handles.items()
        }
        self._rates: dict[str, Rate] = {}
        self._shapes = Shapes(
            lambda name, allowed_s: self._dispatchers[name].describe(allowed_s), settings.timeout_s
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
    ) -> Query:
        """Check a request.

        Raises:
            Refusal: a rule is broken; the message names the first bad sequence.
        """
        started = time.monotonic()
        chosen = self._choose(model)
        check_layer_count(ask.layers)
        sequences = self._read(given, param)
        relative = False
        if variants is not None:
            self._check_count(variants, "variants", "variants")
            if ask.method == "pseudo-ppl":  # a comparison of whole sequences
                sequences, variants = _mutants(sequences[0], variants), None
                ask, relative = Ask("score", "pseudo-ppl"), True
        if positions is not None:
            _check_positions(positions, sequences)
        self._check_cost(chosen, ask, sequences, param, variants or [], positions or [])
        allowed_s = min(timeout_s or math.inf, self.settings.timeout_s)
        self.metrics.tokenise.observe(max(time.monotonic() - started, 1e-6))
        return Query(
            chosen.name,
            ask,
            sequences,
            param,
            started + allowed_s,
            allowed_s,
            request_id[:LONGEST_ID],
            variants or [],
            positions or [],
            relative,
        )

    def admit(self, key: Key | None, residues: int) -> None:
        """Count residues against the key's rate.

        Raises:
            Refusal: it is used up.
        """
        per_minute = (key and key.residues_per_minute) or self.settings.residues_per_minute
        if key is None or per_minute is None:
            return
        name = f"{key.name}:{per_minute}"
        rate = self._rates.setdefault(name, Rate(per_minute / self.settings.gateways))
        wait_s = rate.take(residues)
        if wait_s > 0:
            raise Refusal(
                429,
                "rate_limit",
                f"Key {key.name!r} may send {per_minute:,} residues a minute, which are used up; "
                "wait as long as Retry-After says.",
                retry_after_s=wait_s,
            )

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
        return await self._ledger.hold(needed, query.deadline)

    async def gather(self, query: Query) -> Whole:
        """All answers, from one version of the weights.

        Raises:
            Refusal: there are none, and why.
        """
        for _ in range(ATTEMPTS):
            parts = [part async for part in self.stream(query)]
            if len({part.weights for part in parts}) == 1:
                break
            self._count_retry("update")
        else:
            raise overloaded(1.0)
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

    async def stream(self, query: Query) -> AsyncIterator[Done]:
        """The answers run by run, in order; while an update is going on, perhaps of two versions.

        Raises:
            Refusal: there are none, and why.
        """
        costs = query.costs
        budget = self._models[query.model].max_batch_tokens
        runs, at_once = cut_runs(costs, query.answer_bytes, budget)
        going: deque[asyncio.Task[Done]] = deque()
        try:
            while runs or going:
                while runs and len(going) < at_once:
                    run = runs.popleft()
                    going.append(asyncio.create_task(self._run(query, run, sum(costs[run]))))
                yield await going.popleft()
        finally:
            for task in going:
                task.cancel()

    async def _run(self, query: Query, run: slice, tokens: int) -> Done:
        sequences = query.sequences[run]
        if query.variants:
            tokens = query.ask.tokens(len(sequences[0]), positions_of(query.variants))
        work = Work(
            *(query.ask, sequences, tokens, query.timeout_s, query.request_id, query.variants),
            query.positions[run],
        )
        done = await self._dispatchers[query.model].run(
            work, query.deadline, query.param, run.start
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

    def _check_cost(
        self,
        model: ModelSettings,
        ask: Ask,
        sequences: list[str],
        param: str,
        variants: list[str],
        positions: list[list[int]],
    ) -> None:
        changed = positions_of(variants) if variants else None
        if changed is not None:
            cost = ask.tokens(len(sequences[0]), changed)
        else:
            cost = sum(costs_of(ask, sequences, positions))
        if cost > model.max_queued_tokens:
            raise invalid(
                param,
                f"`{param}` would take {cost:,} tokens to compute, more than the "
                f"{model.max_queued_tokens:,} that may wait; send fewer or shorter sequences.",
            )


def costs_of(ask: Ask, sequences: list[str], positions: list[list[int]]) -> list[int]:
    """Tokens to compute for each sequence."""
    if positions:
        pairs = zip(sequences, positions, strict=True)
        return [ask.tokens(len(sequence), len(some)) for sequence, some in pairs]
    return [ask.tokens(len(sequence)) for sequence in sequences]


def _check_positions(positions: list[list[int]], sequences: list[str]) -> None:
    """Raises Refusal where positions do not fit the sequences."""
    param = "masked_positions"
    if len(positions) != len(sequences):
        raise invalid(
            param,
            f"`{param}` needs a list for each sequence, but {len(positions)} were given for "
            f"{len(sequences)} sequences.",
        )
    for index, (sequence, some) in enumerate(zip(sequences, positions, strict=True)):
        outside = next((each for each in some if not 1 <= each <= len(sequence)), None)
        if outside is not None or not 0 < len(set(some)) == len(some):
            raise invalid(
                param,
                f"`{param}` names positions from 1 to {len(sequence)} of sequence {index}, at "
                f"least one and each once, but {some[:3] if outside is None else outside} was "
                "given.",
            )


def _mutants(sequence: str, variants: list[str]) -> list[str]:
    """The wild type, and what each variant makes of it."""
    residues = encode_residues(sequence)
    try:
        changed = [apply_variant(residues, parse_variant(each, residues)) for each in variants]
    except SequenceError as error:
        raise invalid("variants", str(error)) from None
    return [sequence, *map(decode_residues, changed)]
