"""A recipe: everything that defines a pretraining run."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_serializer, field_validator, model_validator

from raptide.config import Settings
from raptide.data.streaming.batch import StreamSettings
from raptide.model.shapes import AnyShape
from raptide.training.planning.optimizer import OptimizerSettings, cooldown_begin

NO_KEY = (
    "must hold no keys, since recipes are kept and tracked; give them in the environment, as "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3"
)


def without_key(uri: str | None) -> str | None:
    """
    Raises:
        ValueError: it is a URI that names who asks.
    """
    parts = urlsplit(uri or "")  # a key may have a slash, and would end what is left of the path
    if "@" in parts.netloc or (":" in parts.netloc and "@" in parts.path):
        raise ValueError(NO_KEY)
    return uri


class TrainingSettings(Settings):
    """How long, and how a step is cut up."""

    steps: int = Field(ge=1)

    micro_batch_rows: int = Field(ge=1)
    """Packed rows in one forward pass of one worker; what GPU memory allows."""

    max_nonfinite_steps: int = Field(10, ge=1)
    """Steps in a row with a loss or a gradient that is NaN or infinite after which the run stops.
    What such a loss comes from is left out of the update, a step with such a gradient as a whole,
    and both are counted."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2

    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory (ZeRO 1 to 3)."""

    offload_parameters: bool = False
    """Keep the parameters in host memory too (ZeRO 3)."""

    checkpoint_activations: bool = False
    """Keep only each layer's input and compute the rest again on the way back: a third more work
    for a fraction of the memory."""

    compile: bool = False
    """Fuse what surrounds the matrix products with torch.compile; the first steps take a minute
    more."""

    bucket_elements: int = Field(50_000_000, ge=2)
    """Elements of the gradients that the workers send each other at once, ZeRO 1 to 3. Small ones
    leave more memory, large ones use the network better."""

    overlap_comm: bool = True
    """Send them while the backward pass goes on (GPUs), through a second bucket."""

    zero3_keep_whole_below: int = Field(100_000, ge=0)
    """Parameters with fewer elements stay whole on every worker (ZeRO 3)."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Seeds the fresh weights."""

    rotary_base: float = Field(10_000.0, gt=1.0)
    """Base of the rotary frequencies that fresh weights get (ESM-2); larger ones turn more slowly.
    Bundles hold the frequencies, and transformers takes them from there."""

    @model_validator(mode="after")
    def _options_fit_stage(self) -> TrainingSettings:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2, which keep parameters whole")
        return self


class ClusterSettings(Settings):
    """What the run takes from the cluster."""

    workers: tuple[int, int]
    """Training workers, one process and (with `device: cuda`) one GPU each: a number, or the
    fewest and the most, between which the run follows the size of the cluster."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where the cluster has enough of them, or may get them, and CPUs where there
    are none and none may come; a run that cannot tell is refused."""

    cpus_per_worker: int = Field(1, ge=1)

    worker_resources: dict[str, float] = Field(default_factory=dict)
    """Ray resources of your own that each worker takes besides, for example `{trainer: 1}` to keep
    workers off nodes without it."""

    resize_check_s: float = Field(60.0, gt=0.0)
    """Seconds between two looks whether the cluster has room for another number of workers."""

    max_failures: int = Field(3, ge=-1)
    """Restarts after a worker's death before the run gives up; -1 never gives up. Preempted nodes
    and changes of size do not count."""

    data_timeout_s: float = Field(600.0, gt=0.0)
    """Seconds without a batch after which the workers are started again, which counts as a failure,
    or the run stops with a data stall."""

    hang_timeout_s: float = Field(1800.0, gt=0.0)
    """Seconds without progress after which a worker writes the stacks of its threads to the run
    folder and ends, so that the run goes on from its last checkpoint."""

    check_first: bool = False
    """Look at every node and try it out before the workers start (`jobs/check_cluster.py
    --before-training`); a run on a cluster that is not fit is refused."""

    peak_tflops: float | None = Field(None, gt=0.0)
    """What one worker's device can do at best, in 10^12 operations a second, for MFU; None takes
    the data sheet of GPUs that are known."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number_or_two(cls, value: Any) -> tuple[int, int]:
        pair = (value, value) if isinstance(value, int) else tuple(value or ())
        if len(pair) != 2 or not all(type(n) is int for n in pair) or not 1 <= pair[0] <= pair[1]:
            raise ValueError("must be a number of at least 1, or [fewest, most]")
        return pair

    @field_serializer("workers")
    def _as_written(self, workers: tuple[int, int]) -> int | list[int]:
        return list(workers) if self.elastic else workers[0]

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.min_workers < self.max_workers

    @property
    def min_workers(self) -> int:
        return self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers[1]


class CheckpointSettings(Settings):
    every_steps: int = Field(1000, ge=1)

    storage: str | None = None
    """Where checkpoints go: a URI of a file system that pyarrow knows (`s3://bucket/runs`,
    `gs://…`, `file:///shared/runs`), in which each run makes a folder of its own; None puts them
    into the run folder. Keys come from the environment, never from here."""

    when_unsaved: Literal["continue", "stop"] = "continue"
    """What follows when one cannot be saved, for want of space say: the run says so and goes on to
    the next, or stops. Those that were saved before stay in either case."""

    bundle_every: int = Field(1, ge=1)
    """Every so many of the checkpoints hold a bundle as well, for which rank 0 gathers all weights
    while training waits; those that are evaluated and the last one do in any case. A run's model is
    its newest bundle, and `export_model.py` makes one of any checkpoint."""

    average_over: int | None = Field(None, ge=2)
    """Let bundles hold the mean of the weights over about so many checkpoints: the first ones have
    equal parts in it, each later one has one part in so many. What trains goes on from its own
    weights; evaluations are of the mean, so they need `evaluation.asynchronous`."""

    keep: int = Field(3, ge=1)
    """Newest checkpoints that stay, counted by step."""

    keep_best: int = Field(0, ge=0)
    """Of the older ones that were evaluated when they were saved, so many with the lowest held-out
    ECE stay too."""

    def bundles_after(self, step: int) -> bool:
        """Whether the checkpoint of a step holds a bundle, whatever else it is for."""
        return step // self.every_steps % self.bundle_every == 0

    _storage_holds_no_key = field_validator("storage")(without_key)

    @model_validator(mode="after")
    def _every_mean_is_kept(self) -> CheckpointSettings:
        if self.average_over is not None and self.bundle_every > 1:
            raise ValueError(
                "average_over goes on from the mean in the checkpoint before, so it needs "
                "bundle_every: 1"
            )
        return self


class EvaluationSettings(Settings):
    every_steps: int = Field(1000, ge=1)
    """Steps between two held-out evaluations; the last step is always evaluated."""

    blocks: int = Field(8, ge=1)
    """Held-out blocks that are read, from the first on."""

    asynchronous: bool = False
    """Evaluate checkpoints in tasks beside the training, on what is free then: a GPU where it
    trains on GPUs, else CPUs. Otherwise the workers stop for it, as they do at the last step."""

    benchmark: str | None = None
    """A benchmark file (jobs/benchmarks): what checkpoints that are evaluated beside the training
    are asked besides, so that structure and contacts become curves, too; needs `asynchronous`."""

    timeout_s: float = Field(1800.0, gt=0.0)
    """Seconds after which an evaluation beside the training that has not ended is given up, whether
    it has begun or found nothing free; also the longest that a run waits for it at its end."""

    patience: int | None = Field(None, ge=1)
    """Evaluations in a row without a lower held-out ECE after which the run ends; None runs all
    steps."""

    until_ece_masked: float | None = Field(None, gt=1.0)
    """Held-out ECE on `<mask>` at which the run ends, once an evaluation finds it or less; None
    runs all steps."""

    seed: int = Field(7, ge=0, lt=2**63)
    """Fixes crops and masks, so that every evaluation asks for the same residues."""

    @model_validator(mode="after")
    def _benchmark_runs_beside(self) -> EvaluationSettings:
        if self.benchmark is not None and not self.asynchronous:
            raise ValueError("benchmark needs asynchronous: true, since workers do not wait for it")
        return self


class TrackingSettings(Settings):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online with a W&B key at hand, else offline."""

    project: str = "raptide"
    log_every: int = Field(10, ge=1)

    audit: bool = False
    """Write the ids of the packed rows each worker trains on, step by step, to `audit/`."""


class CorpusShare(Settings):
    """One of several corpora."""

    path: str
    weight: float = Field(1.0, gt=0.0)
    """Its share of the residues, against the weights of the others."""

    _path_holds_no_key = field_validator("path")(without_key)


class Recipe(Settings):
    """One pretraining run."""

    name: str
    corpus: tuple[CorpusShare, ...]
    """Corpus folder or URI; or several, as a list of `{path: …, weight: …}`."""

    init_from: str | None = None
    """Model folder, .pt file or run whose weights a new run starts from, of the shape in `model`;
    None draws fresh ones."""

    continue_from: str | None = None
    """Run or checkpoint that a new run goes on from with everything: weights, the optimizer's
    state, the step and the place in the stream; None starts at step 0."""

    stream: StreamSettings = StreamSettings()
    model: AnyShape
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings
    cluster: ClusterSettings
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()

    _start_holds_no_key = field_validator("continue_from")(without_key)

    @field_validator("corpus", mode="before")
    @classmethod
    def _one_corpus_or_more(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"path": value}]
        if not value or not isinstance(value, list | tuple):
            raise ValueError("must be a corpus folder, or a list of {path: …, weight: …}")
        return value

    @field_serializer("corpus")
    def _corpus_as_written(self, corpus: tuple[CorpusShare, ...]) -> str | list[dict[str, Any]]:
        return corpus[0].path if len(corpus) == 1 else [share.model_dump() for share in corpus]

    @model_validator(mode="after")
    def _crop_fits_positions(self) -> Recipe:
        limit = self.model.max_tokens
        if limit is not None and self.stream.crop_tokens > limit:
            raise ValueError(
                f"stream.crop_tokens ({self.stream.crop_tokens}) must be at most "
                f"model.max_positions ({limit})"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_checkpoints(self) -> Recipe:
        each, saved = self.evaluation.every_steps, self.checkpoint.every_steps
        if self.evaluation.asynchronous and each % saved:
            raise ValueError(
                "evaluation.asynchronous evaluates checkpoints, so evaluation.every_steps "
                f"({each}) must be a multiple of checkpoint.every_steps ({saved})"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_what_is_kept(self) -> Recipe:
        if self.checkpoint.average_over is not None and not self.evaluation.asynchronous:
            raise ValueError(
                "checkpoint.average_over is for bundles, which workers do not evaluate while they "
                "train; set evaluation.asynchronous: true"
            )
        return self

    @model_validator(mode="after")
    def _muon_finds_whole_matrices(self) -> Recipe:
        training = self.training
        if self.optimizer.matrices != "muon":
            return self
        if self.model.family == "lstm":
            raise ValueError("optimizer.matrices: muon is for transformers; use adamw")
        if training.zero_stage == 3 or training.offload_optimizer:
            raise ValueError(
                "optimizer.matrices: muon gathers matrices that ZeRO 1 and 2 keep on the device; "
                "use training.zero_stage 0, 1 or 2 without offload_optimizer"
            )
        if training.zero_stage == 0 and training.precision != "fp32":
            raise ValueError(
                f"optimizer.matrices: muon with {training.precision} needs training.zero_stage "
                "1 or 2; at 0 it takes fp32"
            )
        return self

    @model_validator(mode="after")
    def _frequencies_are_fresh(self) -> Recipe:
        if self.training.rotary_base == TrainingSettings.model_fields["rotary_base"].default:
            return self
        if not self.model.rotary:
            raise ValueError(
                f"training.rotary_base is of esm2, whose positions are rotary; leave it out for "
                f"{self.model.family}"
            )
        if self.init_from is not None:
            raise ValueError(
                "training.rotary_base is of fresh weights, and init_from brings frequencies along; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _starts_from_one_place(self) -> Recipe:
        if self.init_from is not None and self.continue_from is not None:
            raise ValueError("init_from and continue_from are two starts; give one of them")
        return self

    @property
    def last_level_step(self) -> int | None:
        """The last one before a `stable` rate falls, whose checkpoint stays; None for others."""
        optimizer = self.optimizer
        if optimizer.decay != "stable" or optimizer.cooldown == 0:
            return None
        return cooldown_begin(optimizer, self.training.steps)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, whatever else goes on."""
        return step % self.checkpoint.every_steps == 0 or step == self.last_level_step

    def accumulation(self, workers: int) -> int:
        """Micro-batches each worker runs in a step, so that all rows find a slot."""
        return -(-self.stream.batch_rows // (workers * self.training.micro_batch_rows))
