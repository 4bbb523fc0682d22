"""The parts of bench_training.py about 1,024 GPUs and 95,000 blocks, simulated on one machine."""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor

from raptide.data.corpus import BLOCK_TABLE, Corpus
from raptide.data.streaming.batch import Cursor, StreamSettings
from raptide.data.streaming.feeder import (
    ACTOR,
    ANSWER_BYTES,
    MOST_A_CALL,
    PAUSE_S,
    Feeder,
    FeederActor,
)
from raptide.data.streaming.letters import MOST_BLOCKS, _count_block
from raptide.data.streaming.shares import BatchShare, pack_shares, unpack_shares
from raptide.data.streaming.stream import (
    Source,
    StreamPlan,
    _to_table,
    cut_batches,
    open_plan,
    prepare_rows,
)
from raptide.training.checkpoints.saving import POLL_S
from raptide.training.watching.audit import AuditWriter, read_audit
from raptide.training.watching.progress import BoardActor

READERS = (8, 128, 1024)
BATCH_ROWS, ROW_TOKENS = 2048, 1024
PROCESSES = 4
"""That simulate the readers, each many of them."""

LEAST_S = 15.0
STEPS_TO_COME = 500_000


def plan_of(corpus: Corpus, batch_rows: int) -> StreamPlan:
    settings = StreamSettings(row_tokens=ROW_TOKENS, batch_rows=batch_rows)
    return StreamPlan((Source(str(corpus.path), corpus.digest),), settings, "esm-33")


class ReadyFeeder(Feeder):
    """A feeder that cuts batches without end out of packed rows that it has in memory."""

    def __init__(self, tables: list[pa.Table], readers: int) -> None:
        super().__init__(None, Cursor(), 0, readers)  # type: ignore[arg-type]
        sizes = itertools.repeat(BATCH_ROWS)
        self._batches = cut_batches(itertools.cycle(tables), sizes, ROW_TOKENS)

    def used(self) -> tuple[float, int]:
        """Seconds of processor time, and bytes of memory at most."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return time.process_time(), peak


@ray.remote(num_cpus=0)
class Readers:
    """Ranks of several nodes; each has its own call on its way, as its worker would."""

    def __init__(self, feeder: Any, ranks: range) -> None:
        self._feeder = feeder
        self._taken = dict.fromkeys(ranks, 0)
        self._most = 1

    def take(self, until: int) -> tuple[int, int, int]:
        """Every rank's shares up to batch `until`: calls, bytes, and tokens of the batches."""
        calls = received = tokens = 0
        waiting = {self._ask(rank, until): rank for rank in self._taken}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=min(64, len(waiting)), timeout=1.0)
            for reference in ready:
                packed, rank = ray.get(reference), waiting.pop(reference)
                calls, received = calls + 1, received + len(packed)
                if not packed:
                    time.sleep(PAUSE_S)
                elif rank == min(self._taken):
                    tokens += self._unpack(packed)
                self._taken[rank] += self._batches(packed)
                if self._taken[rank] < until:
                    waiting[self._ask(rank, until)] = rank
        return calls, received, tokens

    def _ask(self, rank: int, until: int) -> Any:
        first = self._taken[rank]
        return self._feeder.fetch.remote(rank, first, min(self._most, until - first))

    def _unpack(self, packed: bytes) -> int:
        shares = unpack_shares(packed)
        self._most = min(MOST_A_CALL, max(1, ANSWER_BYTES * len(shares) // len(packed)))
        return sum(share.num_tokens for share in shares)

    @staticmethod
    def _batches(packed: bytes) -> int:
        return int.from_bytes(packed[:8], "little")


def measure_feeder(corpus: Corpus) -> dict[str, Any]:
    """Cutting alone, and handing out to more and more readers, batches of 2 M places."""
    plan, tables, rows = plan_of(corpus, BATCH_ROWS), [], 0
    for place in itertools.count():
        tables.append(_to_table(prepare_rows(plan, 0, place), 0, place))
        rows += tables[-1].num_rows
        if rows > 2 * BATCH_ROWS:
            break
    began, tokens = time.process_time(), 0
    for batch in cut_batches(itertools.cycle(tables), [BATCH_ROWS] * 200, ROW_TOKENS):
        tokens += batch.counted().num_tokens
    cut = {"tokens_per_core_s": tokens / (time.process_time() - began)}
    return cut | {str(readers): hand_out(tables, readers) for readers in READERS}


def hand_out(tables: list[pa.Table], readers: int) -> dict[str, float]:
    """What the feeder gives to so many readers, and what it takes for that."""
    feeder = ray.remote(**ACTOR)(ReadyFeeder).remote(tables, readers)
    per_process = readers // PROCESSES
    starts = range(0, readers, per_process)
    processes = [Readers.remote(feeder, range(s, s + per_process)) for s in starts]
    ray.get([process.take.remote(8) for process in processes])  # warms up
    began, (cpu_before, _) = time.perf_counter(), ray.get(feeder.used.remote())
    end, calls, received, tokens = 8, 0, 0, 0
    while (seconds := time.perf_counter() - began) < LEAST_S:
        end += 4 * MOST_A_CALL
        found = ray.get([process.take.remote(end) for process in processes])
        calls += sum(part[0] for part in found)
        received += sum(part[1] for part in found)
        tokens += found[0][2]
    cpu, peak = ray.get(feeder.used.remote())
    batches, cpu_s = end - 8, cpu - cpu_before
    for actor in (feeder, *processes):
        ray.kill(actor)
    return {
        "batches_per_s": batches / seconds,
        "tokens_per_s": tokens / seconds,
        "bytes_per_s": received / seconds,
        "bytes_a_share": received / batches / readers,
        "calls_per_s": calls / seconds,
        "cpu_s_a_batch": cpu_s / batches,
        "batches_per_core_s": batches / cpu_s,
        "feeder_peak_bytes": peak,
    }


def measure_blocks(scratch: Path, small: Corpus) -> tuple[Corpus, dict[str, float]]:
    """A corpus of 95,000 blocks, and what lies between the start of a run on it and its first
    batch."""
    from full_size import BLOCKS, of_full_size  # not where Ray's workers look

    corpus = of_full_size(small, scratch / "full-size")
    plan, process = plan_of(corpus, BATCH_ROWS), psutil.Process()
    before, found = process.memory_info().rss, {}

    def timed(name: str, action: Any) -> Any:
        began = time.perf_counter()
        result = action()
        found[f"{name}_s"] = time.perf_counter() - began
        return result

    timed("verify_tables", corpus.verify)
    opened = timed("open", lambda: open_plan(plan))
    found["table_bytes"] = (corpus.path / BLOCK_TABLE).stat().st_size
    found["bytes_a_block"] = opened.blocks[0].nbytes / BLOCKS
    timed("count", lambda: [_count_block(plan, 0, place) for place in range(8)])
    found["count_core_s"] = found.pop("count_s") / 8 * MOST_BLOCKS
    feeder = FeederActor.remote(plan, Cursor(), STEPS_TO_COME, 1)
    timed("first_batch", lambda: unpack_shares(ray.get(feeder.fetch.remote(0, 0, 1))))
    found["driver_bytes"] = process.memory_info().rss - before
    ray.kill(feeder)
    return corpus, found


def measure_ranks(scratch: Path, corpus: Corpus, ranks: int = 1024) -> dict[str, float]:
    """What 1,024 ranks tell the board, meet for, and leave behind."""
    found: dict[str, float] = {}
    board = BoardActor.remote()
    ray.get(board.notices.remote())
    looks = []
    for _ in range(5):
        began = time.perf_counter()
        for rank in range(ranks):
            board.took.remote(1, rank, f"node-{rank // 8:04d} (10.0.{rank // 2048}.7)", 1e-5)
        ray.get(board.notices.remote())
        looks.append(time.perf_counter() - began)
    found["look_s"] = statistics.median(looks)
    name = "step-00500000-000007-1f0c9a3e"
    files = [f"zero/state/zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(ranks)]
    digest = "0" * 64
    ray.get([board.sent.remote("a", name, r, {f: digest}, None) for r, f in enumerate(files)])
    began = time.perf_counter()
    answers = ray.get(board.answers.remote("a", name))
    found["answers_s"], found["answers_every_s"] = time.perf_counter() - began, POLL_S
    assert len(answers) == ranks
    ray.kill(board)
    manifest = {"files": dict.fromkeys(files, digest)}
    found["manifest_bytes"] = len(json.dumps(manifest))
    reference = ray.put(manifest)
    found["meeting_s"] = meet("nothing", ranks)
    found["manifest_by_value_s"] = meet(manifest, ranks)
    found["manifest_by_reference_s"] = meet([reference], ranks)
    plan = plan_of(corpus, BATCH_ROWS)
    table = _to_table(prepare_rows(plan, 0, 0), 0, 0)
    batch = next(cut_batches(iter([table]), [2], ROW_TOKENS))
    (share,) = unpack_shares(pack_shares([batch], 0, 2))
    return found | measure_audit(scratch, share, ranks)


def meet(data: Any, ranks: int) -> float:
    """Seconds in which all ranks get rank 0's data from Ray Train's own actor."""
    actor = SynchronizationActor.options(max_concurrency=2 * ranks).remote()
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        calls = [
            actor.broadcast_from_rank_zero.remote(rank, ranks, data if rank == 0 else None, "bench")
            for rank in range(ranks)
        ]
        ray.get(calls)
        seconds.append(time.perf_counter() - began)
    ray.kill(actor)
    return statistics.median(seconds[1:])


def measure_audit(
    scratch: Path, share: BatchShare, ranks: int, steps: int = 100
) -> dict[str, float]:
    """A file a rank: what a step adds to all of them, and how fast they are read at the end."""
    run = scratch / "audited"
    run.mkdir()
    for rank in range(ranks):
        writer = AuditWriter(run, rank, 1, print)
        for step in range(1, steps + 1):
            writer.write(step, share)
        writer.close()
    size = sum(file.stat().st_size for file in (run / "audit").iterdir())
    began = time.perf_counter()
    assert read_audit(run).steps == steps
    return {
        "audit_bytes_a_step": size / steps,
        "audit_read_s_a_step": (time.perf_counter() - began) / steps,
    }
