"""How many bytes an answer will take, known before anything of it is computed."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from raptide.alphabet import STANDARD
from serve.calls import Ask, Description, cut
from serve.gateway.refusals import invalid, too_late
from serve.settings import GatewaySettings

ARROW = "application/vnd.apache.arrow.stream"

Encoding = Literal["float", "base64", "arrow"]
"""How numbers are written: JSON's decimal fractions, base64 in JSON, or as they are in memory, as
Arrow and gRPC do."""

NUMBER_BYTES: dict[Encoding, float] = {"float": 12.0, "base64": 16 / 3, "arrow": 4.0}
"""A number of an array; decimal fractions take 10 to 14 (tests/serve/gateway/test_sizes.py)."""

BYTES = 4
"""What a number takes in memory; of scores twice that, which are few."""

ROW_BYTES = 100
"""What stands around the numbers of one sequence."""

MOST_LAYERS = 256

RUNS_AT_ONCE = 8
"""Runs of one request on their way at a time; each holds at most about one batch."""

RUN_BYTES = 2**25
"""Bytes that one run answers, unless one sequence alone answers more."""

STREAM_BYTES = 2**27
"""Bytes of one streamed answer that are computed ahead, unless one run alone has more."""

ASK_AGAIN_S = 5.0
"""How long after a model was asked what it is it is not asked again, during an update."""


@dataclass(frozen=True)
class Shape:
    """What the size of a model's answers depends on."""

    weights: str
    width: int
    layers: int
    tokens: int
    """Columns of its logits."""

    @classmethod
    def of(cls, found: Description) -> Shape:
        return cls(found["weights"], found["width"], found["layers"], len(found["tokens"]))


def count_numbers(ask: Ask, lengths: Sequence[int], variants: int, shape: Shape) -> list[int]:
    """Numbers in the answer to each sequence.

    Args:
        lengths: residues of each, or how many of them are masked.
        variants: how many of the only sequence are scored, if any.
    """
    if ask.call in ("score", "variants"):
        return [variants or 1 for _ in lengths]
    if ask.call == "embed":
        width = len(ask.layers) * shape.width
        return [width * (length if ask.pooling == "residue" else 1) for length in lengths]
    columns = {"logits": shape.tokens, "masked": shape.tokens, "scan": len(STANDARD)}
    return [length * columns.get(ask.call, length) for length in lengths]  # contacts are square


def cut_runs(costs: Sequence[int], sizes: Sequence[int], budget: int) -> tuple[deque[slice], int]:
    """Runs of about one batch, none of which answers more than RUN_BYTES if it can be cut.

    Args:
        costs: tokens to compute for each sequence.
        sizes: bytes of each answer; [] where they are not known.
        budget: tokens of a batch.

    Returns:
        The runs, and how many of them may be on their way at a time.
    """
    sizes = sizes or [0] * len(costs)
    pairs = zip(costs, sizes, strict=True)
    runs = deque(cut([max(cost, size * budget // RUN_BYTES) for cost, size in pairs], budget))
    largest = max(sum(sizes[run]) for run in runs)
    return runs, max(1, min(RUNS_AT_ONCE, STREAM_BYTES // max(1, largest)))


def ahead_bytes(sizes: Sequence[int]) -> int:
    """What a streamed answer holds at most, given the bytes of each sequence's."""
    return min(sum(sizes), max(STREAM_BYTES, *sizes))


def check_size(
    numbers: int, rows: int, encoding: Encoding, param: str, limits: GatewaySettings
) -> None:
    """Raises Refusal where an answer would be larger than answers may be."""

    def takes(encoding: Encoding) -> int:
        return math.ceil(numbers * NUMBER_BYTES[encoding]) + rows * ROW_BYTES

    as_json = encoding != "arrow"
    limit = limits.max_json_bytes if as_json else limits.max_answer_bytes
    if takes(encoding) <= limit:
        return
    remedy = "send fewer or shorter sequences, or ask for fewer layers"
    if as_json and takes("arrow") <= limits.max_answer_bytes:
        remedy = f"use Arrow (`Accept: {ARROW}`), or {remedy}"
    raise invalid(
        param,
        f"The answer would take about {takes(encoding):,} bytes{' of JSON' if as_json else ''}, "
        f"more than the {limit:,} that are sent; {remedy}.",
    )


def check_layer_count(layers: Sequence[int]) -> None:
    """Raises Refusal where layers are too many, or one is named twice."""
    different = len(set(layers))
    if different < len(layers) or len(layers) > MOST_LAYERS:
        raise invalid(
            "layers",
            f"`layers` names each layer once, and at most {MOST_LAYERS}, but {len(layers):,} were "
            f"given, {different:,} of them different.",
        )


def check_layers_differ(layers: Sequence[int], shape: Shape) -> None:
    """Raises Refusal where two numbers, one of them negative, mean one layer of the model."""
    meant: dict[int, int] = {}
    for layer in layers:
        place = layer if layer >= 0 else layer + shape.layers + 1
        if place in meant:
            raise invalid(
                "layers",
                f"`layers` names each layer once, but {meant[place]} and {layer} are the same one "
                f"of this model's {shape.layers}.",
            )
        meant[place] = layer


class Shapes:
    """The shape of each model, as a replica says it once for its weights.

    Args:
        describe: asks a replica of a model for at most so many seconds.
        timeout_s: how long a model may take to say it: with no replica, one has to load first.
    """

    def __init__(
        self, describe: Callable[[str, float], Awaitable[Description]], timeout_s: float
    ) -> None:
        self._describe = describe
        self._timeout_s = timeout_s
        self._known: dict[str, Shape] = {}
        self._asking: dict[str, asyncio.Task[Shape]] = {}
        self._asked: dict[str, float] = {}

    async def of(self, model: str, timeout_s: float, deadline: float) -> Shape:
        """A model's shape. Only the first request after the gateway's start waits for it, and has
        to wait for a replica anyway.

        Args:
            timeout_s: what the request was allowed, for the refusal.
            deadline: as `time.monotonic()`.

        Raises:
            Refusal: no replica says it in time.
        """
        if model in self._known:
            return self._known[model]
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.shield(self._ask(model))
        except TimeoutError:
            raise too_late(timeout_s) from None

    def saw(self, model: str, weights: str) -> None:
        """Other weights have answered: during an update, or after it, their shape may differ."""
        known = self._known.get(model)
        due = time.monotonic() - self._asked.get(model, 0.0) > ASK_AGAIN_S
        if known is not None and known.weights != weights and due:
            self._ask(model)

    def _ask(self, model: str) -> asyncio.Task[Shape]:
        """The one task that asks; whoever needs it waits for the same."""
        if (task := self._asking.get(model)) is None or task.done():
            self._asked[model] = time.monotonic()
            task = self._asking[model] = asyncio.create_task(self._learn(model))
            task.add_done_callback(_read_error)
        return task

    async def _learn(self, model: str) -> Shape:
        shape = self._known[model] = Shape.of(await self._describe(model, self._timeout_s))
        return shape


def _read_error(task: asyncio.Task[Shape]) -> None:
    """Nobody may be waiting for it any more."""
    if not task.cancelled():
        task.exception()
