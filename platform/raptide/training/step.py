"""One update on a global batch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raptide.errors import TrainingDiverged
from raptide.training.batches import Share


@dataclass(frozen=True)
class StepResult:
    """What one update came to, over all workers."""

    loss: float
    """Mean over the targets, in nats; NaN if none was finite."""

    left_out: int
    """Targets in micro-batches whose loss was NaN or infinite."""

    grad_norm: float = 0.0
    """Of the gradients of all of them, before clipping; NaN or infinite if one of them is. Then no
    gradient was used."""

    look: bool = False
    """Rank 0 asks all ranks to look at what goes on beside the steps."""

    stop: bool = False
    """Rank 0 asks all ranks to end the run."""

    leave: bool = False
    """Rank 0 asks all ranks to save and to go, to be resumed another time."""

    save: bool = False
    """Rank 0 asks all ranks to save at once."""

    @property
    def skipped(self) -> bool:
        """Whether the gradients were no numbers, so that none was used."""
        return not math.isfinite(self.grad_norm)


@contextmanager
def _as_divergence() -> Iterator[None]:
    """Within the block, DeepSpeed's end of all scales of an fp16 loss is told as what it is."""
    try:
        yield
    except Exception as error:
        if "scale already at minimum" not in str(error):
            raise
        raise TrainingDiverged(
            "Gradients in fp16 were infinite at every scale of the loss; resume from the last "
            "checkpoint with a lower optimizer.lr or a longer warm-up, or train in bf16."
        ) from None


class ForwardTime:
    """How long a rank's forward passes take, whoever it waits for afterwards.

    At ZeRO stages 0 to 2 nothing in them waits for other ranks; at stage 3 every layer does.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    @contextmanager
    def pass_through(self) -> Iterator[None]:
        """The block is a forward pass; nothing here waits for the device."""
        begins = self._mark()
        yield
        self._marks.append((begins, self._mark()))

    def seconds(self) -> float:
        """All passes since the last call; on a GPU once the device is through with them."""
        marks, self._marks = self._marks, []
        if self._on_gpu:  # not exercised without a GPU
            return sum(begins.elapsed_time(ends) for begins, ends in marks) / 1000
        return sum(ends - begins for begins, ends in marks)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # not exercised without a GPU
        event.record()
        return event


class Stepper:
    """Updates a model on one global batch after the other."""

    def __init__(self, engine: Any, workers: int) -> None:
        """
        Args:
            engine: DeepSpeed's, or what does the same for a model: it is called, goes back and
                steps, and has `module`, `optimizer` and `device`. DeepSpeed's optimizers leave out
                gradients that are no numbers by themselves; for torch's own it is done here.
        """
        self._engine, self._workers = engine, workers
        self._guards = isinstance(engine.optimizer, torch.optim.Optimizer)
        self._forward = ForwardTime(torch.device(engine.device))
        self.forward_s = 0.0
        """Seconds of this rank's own forward passes in the last step."""
        self._finite = torch.ones((), dtype=torch.bool, device=engine.device)
        for parameter in engine.module.parameters():
            parameter.register_hook(self._only_if_finite)

    def _only_if_finite(self, gradient: torch.Tensor) -> torch.Tensor:
        """Before anything adds it up: a pass whose loss is no number gives nothing."""
        return torch.where(self._finite, gradient, 0.0)

    def _only_if_all_finite(self) -> torch.Tensor:
        """The norm of the whole batch's gradients; they become zeros if it is no number.

        Else every weight would be none after the update, since clipping divides by it.
        """
        parameters = self._engine.module.parameters()
        gradients = [each.grad for each in parameters if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        spoiled = ~torch.isfinite(norm)
        for gradient in gradients:
            gradient.masked_fill_(spoiled, 0.0)
        return norm

    def step(
        self,
        share: Share,
        rate: float,
        *,
        look: bool = False,
        stop: bool = False,
        leave: bool = False,
        save: bool = False,
    ) -> StepResult:
        """One update.

        The loss of a micro-batch is a sum, scaled so that the whole step is the mean over the
        targets of the global batch, whatever the number of workers: DeepSpeed divides gradients by
        workers and by accumulation, which the factor takes back. A micro-batch whose loss is not
        finite is left out of the update, and so is everything if a gradient is not finite.

        What rank 0 asks of the others, `look`, `stop`, `leave` and `save`, travels with the loss.
        """
        total = self.launch(share, rate, (look, stop, leave, save))
        nats, left_out, *asked, norm_sum = total.tolist()
        self.forward_s = self._forward.seconds()
        kept = max(share.batch.num_targets, 1) - left_out
        loss = nats / kept if kept > 0 else math.nan
        norm = norm_sum / self._workers
        return StepResult(loss, int(left_out), norm, *(ask > 0 for ask in asked))

    def launch(self, share: Share, rate: float, asks: Sequence[bool]) -> torch.Tensor:
        """Everything but reading what came of it: nothing here waits for the device.

        Returns over all workers the nats, the targets left out, who asks for each of `asks`, and
        the norms of the gradients, of which each worker knows the whole, [3 + asks] float64.
        """
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("of_rate", 1.0)
        factor = self._workers * len(share.micro) / max(share.batch.num_targets, 1)
        found = torch.zeros(2, dtype=torch.float64, device=engine.device)
        norm = None
        for index, micro in enumerate(share.micro):
            with self._forward.pass_through():
                loss = engine(micro.packed, micro.targets).sum()
            self._finite = torch.isfinite(loss.detach())
            kept = torch.where(self._finite, loss, 0.0)
            left_out = torch.where(self._finite, 0.0, float(len(micro.targets.at_N)))
            found += torch.stack([kept.detach(), left_out])
            engine.backward(kept * factor)
            if self._guards and index == len(share.micro) - 1:
                norm = self._only_if_all_finite()
            with _as_divergence():
                engine.step()
        if norm is None:
            norm = engine.get_global_grad_norm()
        asked = found.new_zeros(len(asks))
        for place, ask in enumerate(asks):
            asked[place].fill_(float(ask))
        norm = torch.as_tensor(norm, dtype=found.dtype, device=found.device)
        total = torch.cat([found, asked, norm.reshape(1)])
        if self._workers > 1:
            dist.all_reduce(total)
        return total
