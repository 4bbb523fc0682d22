"""The stream of global batches.

    blocks in epoch order ─ Ray Data: read, pack ─> packed rows in order ─ cut ─> global batches

A global batch is `batch_rows` packed rows, or fewer while batches grow. Which rows, and what is in
them, is a pure function of the stream's fingerprint, a cursor and the batch's number; workers, data
tasks and restarts change nothing.

Where several corpora are mixed (mixture.py), a round of places stands for an epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raptide.alphabet import ALPHABETS
from raptide.data.corpus import Blocks, Corpus
from raptide.data.streaming.batch import (
    Cursor,
    GlobalBatch,
    PackedRows,
    Sampling,
    StreamSettings,
)
from raptide.data.streaming.mixture import Mixture
from raptide.data.streaming.pace import Pace, limit_queues, paced
from raptide.data.streaming.rows import block_order, pack_block
from raptide.errors import CorpusError

STREAM_VERSION = 1
"""Raised whenever the same fingerprint would give other rows."""

PLAN_TASKS = 1 << 14
"""Data tasks in one Ray Data plan, at most: 34 G residues, so that the seam between two plans is
rare, and few enough that the plan itself costs nothing. One plan spans epochs."""

SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of two sources; the first has the stream's own."""

TASK_RESIDUES = 1 << 21
"""Residues one data task prepares, about: enough that a task is worth its overhead."""

TASKS_AHEAD = 16
"""Tasks whose rows fit into the memory for rows ahead, at least. Ray Data keeps half of it for rows
that are on their way, and waits where a task's alone are more than is left."""

RESIDUE_BYTES = 2
"""Of a residue's token, its target and its part of a row's boundaries, about."""

BATCHES_AHEAD = 32
"""Batches that fit into the memory for rows ahead where that is ample."""


@dataclass(frozen=True)
class Source:
    """A corpus that a stream reads."""

    path: str
    digest: str
    weight: float = 1.0
    """Its share of the residues, against those of the others."""

    def open(self) -> Corpus:
        """The corpus, once it is sure to be the one that was planned with.

        Raises:
            CorpusError: another corpus lies at its path, on this node.
        """
        corpus = Corpus.open(self.path)
        if corpus.digest != self.digest:
            raise CorpusError(
                f"{self.path} has digest {corpus.digest[:16]} on {platform.node()}, but the run "
                f"was planned with {self.digest[:16]}; all nodes must see one corpus."
            )
        return corpus


@dataclass(frozen=True)
class StreamPlan:
    """Everything that fixes the stream; plain and small, so it travels to any process."""

    sources: tuple[Source, ...]
    settings: StreamSettings
    alphabet: str

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the run before."""
        excluded = {"lookahead_mb"}
        if not self.settings.batch_warmup_steps:  # as runs have it that are older than these
            excluded |= {"first_batch_rows", "batch_warmup_steps"}
        settings = self.settings.model_dump(exclude=excluded)
        mixed = {"mixture": self._mixture} if len(self.sources) > 1 else {}
        return {
            "stream_version": STREAM_VERSION,
            "corpus_digest": self.corpus_digest,
            "alphabet": self.alphabet,
            **mixed,
            **settings,
        }

    @property
    def corpus_digest(self) -> str:
        """The corpus's digest; of several a digest over theirs and their weights."""
        if len(self.sources) == 1:
            return self.sources[0].digest
        return hashlib.sha256(json.dumps(self._mixture).encode()).hexdigest()

    @property
    def _mixture(self) -> list[list[Any]]:
        return [[source.digest, source.weight] for source in self.sources]

    def training_blocks(self, corpus: Corpus) -> Blocks:
        """The blocks of a corpus that are in use, in its order."""
        blocks = corpus.blocks("train")
        return blocks[: share_of_blocks(len(blocks), self.settings.fraction)]

    def source_seed(self, index: int) -> int:
        """The seed of one source: no two draw the same random bits."""
        return (self.settings.seed + index * SEED_STEP) % 2**63


def share_of_blocks(blocks: int, fraction: float) -> int:
    """How many blocks, from the first on, are a share of them: never none."""
    return math.ceil(fraction * blocks - 1e-9)


def global_batches(
    plan: StreamPlan, cursor: Cursor, count: int, *, first: int = 0
) -> Iterator[GlobalBatch]:
    """The next `count` global batches from `cursor` on. Ray must be running.

    Args:
        first: the number of the first one, which is that of those before the cursor.
    """
    settings, end = plan.settings, first + count
    rows = settings.rows_before(end) - settings.rows_before(first)
    tables = _drop_rows_before(cursor, _packed_tables(plan, cursor, rows * settings.row_tokens))
    yield from cut_batches(tables, map(settings.rows_at, range(first, end)), settings.row_tokens)


def cut_batches(
    tables: Iterator[pa.Table], sizes: Iterable[int], row_tokens: int
) -> Iterator[GlobalBatch]:
    """Batches of so many packed rows each, one after the other, out of tables of any lengths."""
    waiting: list[pa.Table] = []
    held = 0
    for size in sizes:
        while held < size:
            if (table := next(tables, None)) is None:
                return
            waiting.append(table)
            held += table.num_rows
        batch, waiting = _split_tables(waiting, size)
        held -= size
        yield _to_batch(batch, row_tokens)


def prepare_rows(plan: StreamPlan, epoch: int, position: int) -> PackedRows:
    """The packed rows of one place in the stream; runs in Ray Data's tasks and in tests."""
    opened = open_plan(plan)
    place = opened.mixture.locate(epoch * opened.mixture.epoch_places + position)
    blocks = opened.blocks[place.source]
    seed = plan.source_seed(place.source)
    index = int(_order(seed, place.epoch, len(blocks))[place.position])
    block = opened.corpora[place.source].read_block(blocks[index])
    alphabet = ALPHABETS[plan.alphabet]
    return pack_block(block, plan.settings, alphabet, seed, place.epoch, index)


@dataclass(frozen=True)
class OpenedPlan:
    """A plan's corpora as one process has opened them."""

    corpora: list[Corpus]
    blocks: list[Blocks]
    mixture: Mixture
    block_residues: float
    """Residues that a place in the stream gives out, on the average."""


@lru_cache(maxsize=4)
def open_plan(plan: StreamPlan) -> OpenedPlan:
    """A plan's corpora, opened once in a process.

    Raises:
        CorpusError: one is missing, or another than was planned with.
    """
    corpora = [source.open() for source in plan.sources]
    blocks = [plan.training_blocks(corpus) for corpus in corpora]
    drawn = [
        drawn_residues(corpus, used, plan.settings.sampling)
        for corpus, used in zip(corpora, blocks, strict=True)
    ]
    weights = [source.weight for source in plan.sources]
    mixture = Mixture.of(list(map(len, blocks)), drawn, weights)
    return OpenedPlan(corpora, blocks, mixture, mixture.mean(drawn))


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, num_blocks: int) -> np.ndarray:
    return block_order(seed, epoch, num_blocks)


def drawn_residues(corpus: Corpus, blocks: Blocks, sampling: Sampling) -> float:
    """Residues that one of the blocks gives out in an epoch, about."""
    counts = corpus.manifest["counts"]["train"]
    share = 1.0 if sampling == "all" else counts["clusters"] / max(counts["sequences"], 1)
    return share * blocks.residues / max(len(blocks), 1)


def _packed_tables(plan: StreamPlan, cursor: Cursor, tokens: int) -> Iterator[pa.Table]:
    """Ray Data's ordered stream of packed rows, plan after plan, without end.

    A plan has as many blocks as `tokens` tokens should take, so that nothing is prepared in vain;
    where that falls short (crops, members of other lengths), the next plan goes on.
    """
    opened = open_plan(plan)
    epoch_places = opened.mixture.epoch_places
    task_blocks = max(1, round(_task_residues(plan.settings) / opened.block_residues))
    plan_blocks = min(int(tokens / opened.block_residues) + 2, PLAN_TASKS * task_blocks)
    _configure_ray_data(plan)
    first = cursor.epoch * epoch_places + cursor.block
    while True:
        # A map before `repartition` would turn its streaming form into a barrier, so that tasks
        # become places in `prepare`.
        # A generator: only out of those does Ray Data let our own errors through.
        def prepare(ids: dict[str, np.ndarray], first: int = first) -> Iterator[pa.Table]:
            for task in ids["id"].tolist():
                places = range(plan_blocks)[task * task_blocks : (task + 1) * task_blocks]
                tables = [_prepare_table(plan, first + p, epoch_places) for p in places]
                yield pa.concat_tables(tables)

        # One task lists them: of several, what the later ones list would wait for the first.
        dataset = ray.data.range(-(-plan_blocks // task_blocks), override_num_blocks=1)
        dataset = dataset.repartition(target_num_rows_per_block=1)
        dataset = dataset.map_batches(prepare, batch_size=None)
        # Of this dataset alone: another's reader would not say when it waits.
        dataset.context.custom_execution_callback_classes = [Pace]
        limit_queues(dataset.context, ample=_is_ample(plan.settings))
        yield from paced(
            dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        )
        first += plan_blocks


def _task_residues(settings: StreamSettings) -> float:
    """What a task prepares: so much that several of them fit into what may lie ahead."""
    return min(TASK_RESIDUES, settings.lookahead_mb * 1e6 / TASKS_AHEAD / RESIDUE_BYTES)


def _is_ample(settings: StreamSettings) -> bool:
    """Whether a reader that gathers a batch leaves room for the next rows."""
    batch = settings.batch_rows * settings.row_tokens * RESIDUE_BYTES
    return settings.lookahead_mb * 1e6 >= BATCHES_AHEAD * batch


def _configure_ray_data(plan: StreamPlan) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=plan.settings.lookahead_mb * 1e6
    )
    context.execution_no_progress_timeout_s = -1  # waiting for the trainer is no hang
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _prepare_table(plan: StreamPlan, place: int, epoch_places: int) -> pa.Table:
    epoch, position = divmod(place, epoch_places)
    return _to_table(prepare_rows(plan, epoch, position), epoch, position)


def _to_table(rows: PackedRows, epoch: int, block: int) -> pa.Table:
    """Packed rows as an Arrow table; the inverse of `_to_batch`."""
    count, width = rows.tokens.shape
    splits = np.concatenate([[0], np.cumsum([len(s) for s in rows.segments])]).astype(np.int32)
    lengths = np.concatenate([*rows.segments, np.empty(0, np.int32)])
    return pa.table(
        {
            "tokens": _fixed_binary(rows.tokens, width),
            "targets": _fixed_binary(rows.targets, width),
            "segments": pa.ListArray.from_arrays(splits, pa.array(lengths, pa.int32())),
            "epoch": np.full(count, epoch, np.int64),
            "block": np.full(count, block, np.int64),
            "row": np.arange(count, dtype=np.int64),
        }
    )


def _fixed_binary(array: np.ndarray, width: int) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(array))
    return pa.Array.from_buffers(pa.binary(width), len(array), [None, buffer])


def _drop_rows_before(cursor: Cursor, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Leave out the rows of the cursor's block that came before the cursor."""
    for table in tables:
        if table.num_rows and cursor.row:
            here = (table["epoch"].to_numpy() == cursor.epoch) & (
                table["block"].to_numpy() == cursor.block
            )
            table = table.filter(pa.array(~(here & (table["row"].to_numpy() < cursor.row))))
        yield table


def _split_tables(tables: list[pa.Table], size: int) -> tuple[list[pa.Table], list[pa.Table]]:
    """The first `size` rows of some tables, and what is left; slices, not copies."""
    taken = []
    for index, table in enumerate(tables):
        if table.num_rows > size:
            taken.append(table.slice(0, size))
            return taken, [table.slice(size), *tables[index + 1 :]]
        taken.append(table)
        size -= table.num_rows
        if size == 0:
            return taken, tables[index + 1 :]
    raise AssertionError("fewer rows than asked for")


def _to_batch(tables: list[pa.Table], row_tokens: int) -> GlobalBatch:
    table = pa.concat_tables(tables)

    def matrix(name: str) -> np.ndarray:
        """The only copy, so that no batch keeps whole blocks in the object store."""
        pieces = []
        for chunk in table[name].chunks:
            flat = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, row_tokens)
            pieces.append(flat[chunk.offset : chunk.offset + len(chunk)])
        return np.concatenate(pieces)

    segments = table["segments"].combine_chunks()
    splits = (segments.offsets.to_numpy() - segments.offsets[0].as_py()).tolist()
    lengths = segments.flatten().to_numpy().astype(np.int32)
    row_ids = np.stack([table[name].to_numpy() for name in ("epoch", "block", "row")], axis=1)
    epoch, block, row = row_ids[-1].tolist()
    return GlobalBatch(
        rows=PackedRows(
            tokens=matrix("tokens"),
            targets=matrix("targets"),
            segments=[lengths[start:end] for start, end in pairwise(splits)],
        ),
        row_ids=row_ids,
        next_cursor=Cursor(epoch, block, row + 1),
    )


def describe_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first field in which two fingerprints differ, as `name: before -> now`."""
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            return f"{name}: {before.get(name)} -> {now.get(name)}"
    return None
