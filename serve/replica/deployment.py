"""A replica: one engine and its batcher. Speaks Python, not HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray import serve
from ray.serve.exceptions import RayServeException

from raptide.alphabet import encode_residues
from raptide.errors import ConfigError
from raptide.inference.engine import CONTACT_RESIDUES, Engine
from raptide.methods import blind_to_masks
from raptide.model.check import verify_check
from raptide.model.device import CPU_SIZES, first_sizes
from raptide.model.formats.tensor_files import digest_weights
from serve.calls import (
    PATHS,
    SPECIALS,
    Ask,
    Begun,
    Description,
    Done,
    Load,
    Refused,
    Status,
    Taken,
    Work,
)
from serve.metrics import ReplicaMetrics, Speed
from serve.models import open_model
from serve.replica.batcher import (
    Answers,
    Batch,
    DeadlinePassed,
    QueueFull,
    Stopped,
    TokenBatcher,
)
from serve.replica.plan import Plan, Unfit
from serve.settings import ModelSettings

logger = logging.getLogger("ray.serve")

BEGUN_S = 0.005
"""Word that work is being computed is spared where it is over so soon. What kills a replica sooner
is found all the same, when it is computed alone."""

NEVER = 2**60
"""Tokens of a replica that computes no more: one that is always idle would be sent everything."""

SLACK_SHARE = 4
"""Of a batch, which part a replica may have more to do than another before work moves there."""

SWITCH_S = 0.0005
"""How long the event loop may keep the interpreter from the thread that computes (Python's default
is ten times that, which the next layer would wait for)."""


WARM_UP_S = 60.0
"""How long a replica computes for practice; the pass that is going on then is finished."""


class Replica:
    """One model on one device; requests share its batches.

    The constructor does not return before the model has answered as its bundle says, so that no
    request ever reaches weights that are damaged or another model's.
    """

    def __init__(self, settings: ModelSettings) -> None:
        sys.setswitchinterval(SWITCH_S)
        self._settings = settings
        path, device = open_model(settings), device_given()
        self._engine, self._verified = _in_its_own_thread(_load, settings, path, device).result()
        self._probe: Future[None] | None = None
        self._weights = digest_weights(path)[:16]
        step = self._engine.lineage.get("step")
        self._step = step if isinstance(step, int) else None
        self._name, self._node = _own_place()
        self._metrics = ReplicaMetrics(settings.name, settings.max_batch_tokens)
        self._speed = Speed()
        self._batcher = TokenBatcher(
            self._compute, settings.max_batch_tokens, settings.max_queued_tokens, self._observe
        )

    async def run(self, work: Work) -> AsyncIterator[Taken | Begun | Done | Refused]:
        """How far it is, then one answer or why there is none; never raises."""
        async with aclosing(self._steps(work)) as steps:
            async for each in steps:
                if isinstance(each, Done | Refused):
                    self._write_down(work, each)
                yield each

    @staticmethod
    def _write_down(work: Work, answer: Done | Refused) -> None:
        """A line of the log, with the request's id as Serve knows it; nothing of the sequences."""
        said: dict[str, Any] = {"call": work.ask.call, "tokens": work.tokens}
        if isinstance(answer, Refused):
            said["refused"] = answer.reason
        else:
            said["queue_s"] = round(answer.queue_s, 4)
            said["compute_s"] = round(answer.compute_s, 4)
        logger.info("%r: %s", work, said.get("refused", "done"), extra=said)

    async def _steps(self, work: Work) -> AsyncGenerator[Taken | Begun | Done | Refused, None]:
        try:
            async with aclosing(self._run(work)) as steps:
                async for each in steps:
                    yield each
        except Unfit as unfit:
            yield Refused(unfit.reason, str(unfit), unfit.index)
        except QueueFull:
            wait_s = max(1, round(self._batcher.drain_s))
            yield Refused("full", retry_after_s=wait_s, load=self._own_load)
        except DeadlinePassed:
            yield Refused("deadline")
        except Stopped:
            yield Refused("stopped", load=Load(self._name, NEVER))
        except Exception as error:
            _report(work, error)
            yield Refused("failed")
        finally:
            self._metrics.queued(self._batcher.queued_tokens)

    async def _run(self, work: Work) -> AsyncGenerator[Taken | Begun | Done | Refused, None]:
        deadline = time.monotonic() + work.timeout_s
        if self._is_misled(work):
            yield Refused("busier", load=self._own_load)
            return
        plan = self._plan(work)
        with self._batcher.enter(
            plan.kind, plan.pieces, deadline, admitted=work.admitted, alone=work.alone
        ) as place:
            if work.leads:
                yield Taken(self._weights)
            await place.begun()
            if work.alone or not await place.is_over(BEGUN_S):
                yield Begun(self._node)
            answers = await place.answers()
        self._metrics.request(answers.queue_s)
        self._speed.add(sum(map(len, work.sequences)))
        yield self._done(plan, answers)

    @property
    def _own_load(self) -> Load:
        return Load(self._name, self._batcher.pending_tokens)

    def _is_misled(self, work: Work) -> bool:
        """Whether work came because its gateway had not heard of what others sent here."""
        if not work.movable or work.instead is None:
            return False
        slack = self._settings.max_batch_tokens // SLACK_SHARE
        return self._batcher.pending_tokens > work.instead + slack

    def _plan(self, work: Work) -> Plan:
        """Raises Unfit for what this model cannot do, or is not."""
        if work.weights not in ("", self._weights):
            raise Unfit(self._weights, reason="version")
        self._refuse_what_the_model_lacks(work.ask)
        residues = [self._read(index, s, work.ask) for index, s in enumerate(work.sequences)]
        return Plan(work, residues, self._settings.max_batch_tokens)

    async def record_replica_metadata(self) -> dict[str, str]:
        """What routers know of a replica: work that is for one version goes nowhere else."""
        return {"weights": self._weights}

    async def describe(self) -> Description:
        """What /v1/models says."""
        model = self._engine.model
        return {
            "width": self._engine.width,
            "layers": model.settings.layers,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": self._engine.dtype,
            "max_residues": self._engine.max_residues,
            "tokens": list(self._engine.tokens),
            "calls": self._calls,
            "weights": self._weights,
            "verified": self._verified,
            "lineage": self._engine.lineage,
        }

    async def status(self) -> Status:
        """How this replica stands, for /v1/models and /v1/status."""
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "weights": self._weights,
            "step": self._step,
            "queued_tokens": self._batcher.queued_tokens,
            "pending_tokens": self._batcher.pending_tokens,
            "residues_per_s": self._speed.per_s,
            "model": await self.describe(),
        }

    @property
    def _calls(self) -> list[str]:
        """The paths under /v1 that this model has the heads for."""
        model = self._engine.model
        contacts = ["contacts"] if model.contact_head is not None else []
        return ["embeddings", *contacts, *(["logits", "scan", "scores"] if model.has_head else [])]

    async def probe(self) -> None:
        """Returns once the model has answered, beside whatever is being computed.

        A caller that asks during a probe waits for the same answer: /readyz takes no key.

        Raises:
            Stopped: nothing that waits would be computed any more.
        """
        self._batcher.check()
        if self._probe is None or self._probe.done():
            self._probe = _in_its_own_thread(self._answer_with_numbers)
        await asyncio.shield(asyncio.wrap_future(self._probe))

    async def check_health(self) -> None:
        """Serve's probe: the model must answer with numbers, and the queue be worked off."""
        self._metrics.queued(self._batcher.queued_tokens)  # exported once, each time it is set
        await self.probe()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For the autoscaling policy (serve/scaling.py)."""
        return {"pending_tokens": float(self._batcher.pending_tokens)}

    async def process(self) -> dict[str, Any]:
        """This process and what it holds, for tests that kill replicas or weigh them."""
        memory = psutil.Process().memory_full_info()
        return {
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "uss_bytes": memory.uss,
            "pss_bytes": memory.pss,
            "computed_tokens": self._batcher.computed_tokens,
        }

    def _answer_with_numbers(self) -> None:
        if not np.isfinite(self._engine.embed(["M"])).all():
            raise RuntimeError("The model answers with something that is no number.")

    def _refuse_what_the_model_lacks(self, ask: Ask) -> None:
        if PATHS[ask.call] not in self._calls:
            missing = "contact head" if ask.call == "contacts" else "language-model head"
            raise Unfit(
                f"This model has no {missing}, so it answers {' and '.join(self._calls)} alone; "
                "ask another model.",
                reason="model",
            )
        settings = self._engine.model.settings
        if ask.masks and settings.blind:
            raise Unfit(blind_to_masks(ask.method), reason="model")
        last = settings.layers
        for layer in ask.layers if ask.call == "embed" else ():
            if not -last - 1 <= layer <= last:
                raise Unfit(
                    f"This model has layers 0 to {last} (or -1 to {-last - 1}), but layer {layer} "
                    "was asked for.",
                    reason="layers",
                )

    def _read(self, index: int, sequence: str, ask: Ask) -> np.ndarray:
        """Residue ids, or a refusal for what this model cannot do."""
        longest = self._engine.max_residues
        if ask.call == "contacts":
            longest = min(longest, CONTACT_RESIDUES)
        residues = encode_residues(sequence)
        if len(residues) > longest:
            raise Unfit(
                f"at most {longest} residues are taken by this model, but {len(residues)} were "
                "given; cut it into domains.",
                index,
            )
        return residues

    def _compute(self, kind: tuple[Any, ...], payloads: list[Any]) -> Sequence[Any]:
        """One batch, in the batcher's thread."""
        if kind[0] == "embed":
            _, pooling, layers = kind
            return list(self._engine.embed(payloads, layers, pooling))
        if kind[0] == "logits":
            return self._engine.logits(payloads)
        if kind[0] == "contacts":
            return self._engine.contacts(payloads)
        return self._engine.masked_log_p(payloads)

    def _done(self, plan: Plan, answers: Answers) -> Done:
        arrays = plan.finish(answers.values)
        return Done(
            arrays,
            self._weights,
            self._step,
            answers.queue_s,
            answers.compute_s,
            self._own_load,
        )

    def _observe(self, batch: Batch) -> None:
        self._metrics.batch(batch.tokens, batch.seconds)
        self._metrics.queued(self._batcher.queued_tokens)


def device_given() -> str:
    """The device that Ray gave this process: "cpu", unless it was given a GPU or a part of one.

    Ray hides no GPU from a process that asked for none.

    Raises:
        ConfigError: it was given a GPU that PyTorch does not see.
    """
    given = ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    if not given:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"`gpus_per_replica` asks for a GPU, and Ray gave GPU {given[0]}, but PyTorch sees "
            "none there; install PyTorch for CUDA on that node, or set it to 0."
        )
    return "cuda"


def _own_place() -> tuple[str, str]:
    """The replica's name, as routers know it, and its node; empty outside of Serve."""
    try:
        name = str(serve.get_replica_context().replica_id)
    except RayServeException:
        return "", ""
    return name, ray.get_runtime_context().get_node_id()


def _report(work: Work, error: Exception) -> None:
    """Where it happened, without what it said: that may hold sequences."""
    places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    logger.error("%r failed with %s at %s.", work, type(error).__name__, " ".join(places[-4:]))


def _load(settings: ModelSettings, path: Path, device: str) -> tuple[Engine, bool]:
    """The engine, warm, and whether its bundle had a check, which it has passed."""
    engine = Engine.load(
        path, device=device, dtype=settings.dtype, max_batch_tokens=settings.max_batch_tokens
    )
    verified = verify_check(path, engine.model)
    warm_up(engine)
    return engine, verified


def warm_up(engine: Engine) -> None:
    """Compute what is slow only once, so that no client waits for it; within about WARM_UP_S."""
    until = time.monotonic() + WARM_UP_S
    compute = engine.logits if engine.model.has_head else engine.embed
    for size in first_sizes(engine.model.embed.weight.device, engine.max_batch_tokens):
        residues = max(1, size - SPECIALS)
        longest = min(residues, engine.max_residues)
        compute(["M" * longest] * max(1, residues // longest))
        if time.monotonic() > until:
            logger.warning("Batches above %d tokens were not computed before traffic.", size)
            return
    if engine.lanes > 1:  # oneDNN generates code by the number of threads, too
        longest = min(CPU_SIZES[0] - SPECIALS, engine.max_residues)
        compute(["M" * longest] * (2 * engine.lanes * CPU_SIZES[0] // longest))
    if engine.model.contact_head is not None:
        engine.contacts(["M" * CPU_SIZES[-1]])


def _in_its_own_thread(compute: Callable[..., Any], *args: Any) -> Future[Any]:
    """Computes in a thread that then ends, and OpenMP's threads for it with it.

    OpenMP keeps a team for every living thread that ever computed. Were there more of them than
    cores, no thread would spin any more while it waits for the others of its team, and each of the
    batcher's passes would take a few milliseconds longer.
    """
    once = ThreadPoolExecutor(1)
    future = once.submit(compute, *args)
    once.shutdown(wait=False)
    return future
