"""Saving: DeepSpeed writes to local scratch while training waits, all else goes on behind it.

save()     every rank writes its shards to scratch; rank 0 takes the weights of the bundle
_send()    in Ray Train's upload thread: rank 0 completes the bundle; hash the files and copy them
           to the storage
_finish()  once every rank has sent its files, rank 0 writes the manifest: now it counts
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from safetensors import SafetensorError

from raptide.attempts import Attempt, Attempts
from raptide.errors import PassingTrouble, RaptideError, Superseded
from raptide.patience import is_final, patiently
from raptide.storage import copy_stream
from raptide.training.checkpoints.checkpoint import (
    FORMAT_VERSION,
    MODEL,
    TRANSFERS,
    ZERO,
    ZERO_TAG,
)
from raptide.training.checkpoints.keeping import best_effort, prune, write_manifest
from raptide.training.checkpoints.owned import Storage, checkpoint_name
from raptide.training.checkpoints.step_bundle import StepBundle
from raptide.training.planning.recipe import CheckpointSettings

POLL_S = 0.1

OWNER_EVERY_S = 60.0
"""Seconds between two questions, beside those at each save, whose the storage is."""


class Unsaved(NamedTuple):
    """Why a rank's part of a checkpoint is not there."""

    reason: str
    passes: bool
    """Whether it may be over at the next try."""

    @classmethod
    def of(cls, error: Exception) -> Self:
        passing = isinstance(error, OSError) and not is_final(error)
        return cls(str(error), passing or isinstance(error, PassingTrouble))


class CheckpointWriter:
    """Saves the checkpoints of one worker, one at a time."""

    def __init__(
        self,
        settings: CheckpointSettings,
        board: Any,
        attempt: Attempt,
        scratch: Path,
        needed_bytes: float,
        send_beside: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            board: handle of the driver's board, through which the workers tell rank 0.
            attempt: whose checkpoints count as long as it owns the storage.
            scratch: a folder of this rank's own.
            needed_bytes: free space in the scratch without which nothing is saved.
            send_beside: sends what the run says of itself, before a checkpoint counts.
        """
        self._settings, self._board, self._attempt = settings, board, attempt
        self._scratch = scratch
        self._needed_bytes = needed_bytes
        self._send_beside = send_beside or (lambda: None)
        self._storage = Storage.of_ray_train()
        self._manifest: dict[str, Any] = {}
        self._bundle: StepBundle | None = None
        self._unwritten: list[str] = []
        self._asked = time.monotonic()
        self._idle = threading.Event()
        self._idle.set()
        self.unevaluated: dict[str, float] = {}
        """Checkpoints that wait to be evaluated, and since when (`time.monotonic`), on rank 0; they
        must not be deleted yet."""
        self.superseded: Superseded | None = None
        """Who owns the storage now, on rank 0."""
        self.problem: str | None = None
        """Why the last checkpoint could not be saved, on rank 0."""
        self.problem_passes = False
        """Whether it may be over by now."""
        self.last_seconds: float | None = None
        """What the last one took until it counted, on rank 0."""

    def save(self, engine: Any, manifest: dict[str, Any], bundle: StepBundle | None) -> str:
        """Save through Ray Train; every rank calls it and goes on once its files are written.

        Returns the checkpoint's name.

        Args:
            manifest: what rank 0 writes, without `files`; with `awaits_evaluation` the checkpoint
                waits in `unevaluated` from when it counts.
            bundle: of this step, if there is to be one.
        """
        self.wait()
        self._began = time.perf_counter()
        name = checkpoint_name(manifest["step"], self._attempt)
        folder = self._scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        if not self._everyone_has_room(folder / ZERO / ZERO_TAG):
            shutil.rmtree(folder, ignore_errors=True)
            self._fail(name, Unsaved(f"{self._scratch} has too little space on some node", False))
            return name
        with noted_problems(engine) as self._unwritten:
            engine.save_checkpoint(str(folder / ZERO), tag=ZERO_TAG, save_latest=False)
        self._bundle = bundle
        if bundle is not None:
            bundle.gather(engine, folder / MODEL)
        self._manifest = manifest
        self._idle.clear()
        ray.train.report(
            {key: manifest[key] for key in ("step", "train_loss", "heldout_ece")},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,  # agreed on among all ranks, so nobody sends before this
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._send,
        )
        return name

    def wait(self) -> None:
        """Return once nothing is on its way any more; on rank 0, once the last one counts."""
        self._idle.wait()

    def _everyone_has_room(self, folder: Path) -> bool:
        """Whether on every node the scratch has room, and a folder for the engine's files."""
        try:
            folder.mkdir(parents=True)
            enough = shutil.disk_usage(folder).free >= self._needed_bytes
        except OSError:
            enough = False
        agreed = torch.tensor([int(enough)])
        if dist.get_backend() == "nccl":  # not exercised without a GPU
            agreed = agreed.cuda()
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return bool(agreed.item())

    def _send(self, local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Called by Ray Train in a thread of its own."""
        rank = ray.train.get_context().get_world_rank()
        files: dict[str, str] = {}
        problem = Unsaved(self._unwritten[0], False) if self._unwritten else None
        try:
            try:
                if problem is None and self._bundle is not None and rank == 0:
                    self._bundle.finish()
                if problem is None:
                    self._send_beside()
                    files = send_folder(Path(local.path), self._storage, name)
            except (OSError, SafetensorError, RaptideError) as error:
                problem = Unsaved.of(error)
            if problem is not None:
                problem = problem._replace(reason=f"rank {rank}: {problem.reason}")
            ray.get(self._board.sent.remote(self._attempt.name, name, rank, files, problem))
            if rank == 0:
                self._finish(name)
        finally:
            self._idle.set()
        return ray.train.Checkpoint(f"{self._storage.path}/{name}", self._storage.filesystem)

    def _finish(self, name: str) -> None:
        workers = ray.train.get_context().get_world_size()
        ask = partial(self._board.answers.remote, self._attempt.name, name)
        while len(answers := ray.get(ask())) < workers:
            time.sleep(POLL_S)
        problems = [problem for _, problem in answers.values() if problem is not None]
        if problems:
            self._fail(name, next((each for each in problems if not each.passes), problems[0]))
            return
        files: dict[str, str] = {}
        for sent, _ in answers.values():
            assert not files.keys() & sent.keys(), "two ranks wrote the same file"
            files |= sent
        try:
            self.refuse_others()
            full = {"format_version": FORMAT_VERSION, **self._manifest, "files": files}
            write_manifest(self._storage, name, full)
        except Superseded:
            return
        except RaptideError as error:
            self._fail(name, Unsaved.of(error))
            return
        if full["awaits_evaluation"]:
            self.unevaluated[name] = time.monotonic()
        self.prune(name)
        self.problem = None
        self.last_seconds = time.perf_counter() - self._began

    def look(self) -> None:
        """Ask on rank 0, now and then, whose the storage is, while the training goes on; what fails
        now may wait."""
        if time.monotonic() - self._asked > OWNER_EVERY_S:
            self._asked = time.monotonic()
            threading.Thread(target=self._look, name="owner", daemon=True).start()

    def _look(self) -> None:
        with suppress(RaptideError):
            self.refuse_others()

    def refuse_others(self) -> None:
        """
        Raises:
            Superseded: another attempt owns the storage.
            RaptideError: the storage fails.
        """
        self._asked = time.monotonic()
        try:
            Attempts(self._storage).refuse_others(self._attempt.name)
        except Superseded as error:
            self.superseded = error
            raise

    def prune(self, newest: str) -> None:
        """Delete what the settings do not keep; not while a save is on its way."""
        settings, spare = self._settings, tuple(self.unevaluated)
        with best_effort(self._warn, "Old checkpoints were not deleted, and will be tried again"):
            self.refuse_others()
            prune(self._storage, newest, settings.keep, settings.keep_best, spare)

    def _fail(self, name: str, unsaved: Unsaved) -> None:
        """Leave no part of a checkpoint, and tell the user."""
        reason = " ".join(unsaved.reason.split())
        self.problem = f"{name} could not be saved ({reason}); see to that before the next one."
        self.problem_passes = unsaved.passes
        if dist.get_rank() == 0:
            self._warn(self.problem)
            with best_effort(self._warn, f"What there is of {name} was not deleted"):
                self._storage.delete(name)

    def _warn(self, sentence: str) -> None:
        self._board.warn.remote(sentence)


@contextmanager
def noted_problems(engine: Any) -> Iterator[list[str]]:
    """Within the block, why files of a DeepSpeed engine could not be written is kept, not raised.

    While an engine saves, its ranks wait for each other: one that raised would leave the others
    waiting.
    """
    problems: list[str] = []

    def noted(write: Callable[..., Any]) -> Callable[..., None]:
        def try_to(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch's own writer has no OSError
                problems.append(str(error))

        return try_to

    with ExitStack() as stack:
        for owner, name in ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")):
            setattr(owner, name, noted(getattr(owner, name)))
            stack.callback(delattr, owner, name)
        yield problems


def send_folder(folder: Path, storage: Storage, name: str) -> dict[str, str]:
    """Copy a folder's files to `name` in the storage; returns the SHA-256 of each, by its name.

    Raises:
        OSError: one could not be written.
    """
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for parent in sorted({str(file.parent) for file in files}):
        target = f"{storage.path}/{name}/{parent}"
        patiently(partial(storage.filesystem.create_dir, target, recursive=True))

    def send(file: Path) -> str:
        target = f"{storage.path}/{name}/{file}"
        with (
            (folder / file).open("rb") as source,
            storage.filesystem.open_output_stream(target) as sink,
        ):
            return copy_stream(source, sink)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        sent = pool.map(lambda file: patiently(partial(send, file)), files)
        return dict(zip(map(str, files), sent, strict=True))
