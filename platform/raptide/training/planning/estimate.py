"""What a run will take, before it takes it: memory and arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from raptide.data.streaming.shares import BatchShare
from raptide.model.families import count_in_matrices, count_parameters, make_model
from raptide.model.packed import Packed, Targets
from raptide.model.shapes import AnyShape
from raptide.training.planning.recipe import Recipe, TrainingSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PROBE_SEQUENCES = (128, 128)
"""Lengths of the sequences on which saved activations are counted."""

LIVE_PARAMETERS = 10**9
"""Elements of weights that DeepSpeed keeps gathered at stage 3 until they are used again."""

FLAT_ELEMENTS = 5 * 10**8
"""Elements of gradients, at most, that it copies to send them at stage 0."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes that one worker holds on its device."""

    weights: float
    optimizer: float
    """Adam's two moments or Muon's one, and the fp32 weights that they update where those are
    others."""
    buckets: float
    """Room for the gradients that travel."""
    gradients: float
    activations: float
    """What the forward pass of one micro-batch keeps for the backward pass."""
    gathered: float
    """At stage 3 the weights of all workers, which stay from their use on the way forth to that on
    the way back, and the bucket that the next ones come in."""
    update: float
    """The gradients of an update and its copies of them, in place of the three above."""

    @property
    def total(self) -> float:
        """At the worst moment."""
        standing = self.weights + self.optimizer + self.buckets
        return standing + max(self.gradients + self.activations + self.gathered, self.update)

    def __str__(self) -> str:
        """In GB, the whole and its parts."""
        parts = {name: f"{name} {size / 1e9:.2f}" for name, size in asdict(self).items()}
        update, total = parts.pop("update"), f"{self.total / 1e9:.2f} GB"
        return f"{total} ({', '.join(parts.values())}; {update} in place of the last three)"


def worker_memory(recipe: Recipe, workers: int) -> WorkerMemory:
    """What ZeRO leaves on each worker (Rajbhandari et al., SC 2020), and what DeepSpeed adds to it.

    Compared with real engines in tests/training/planning/test_allocated.py. Not counted:
    fragmentation, and what CUDA itself takes.
    """
    training = recipe.training
    stage, parameters = training.zero_stage, count_parameters(recipe.model)
    stored = DTYPES[training.precision].itemsize
    shared = [workers if stage >= least else 1 for least in (3, 2, 1)]
    weights, gradients, optimizer = (parameters / by for by in shared)
    tokens = training.micro_batch_rows * recipe.stream.row_tokens
    gathered = min(parameters, LIVE_PARAMETERS) + bucket_elements(recipe) if stage == 3 else 0
    return WorkerMemory(
        weights=0 if training.offload_parameters else stored * weights,
        gradients=stored * gradients * (2 if stage == 2 and accumulates(recipe, workers) else 1),
        optimizer=0 if training.offload_optimizer else optimizer_bytes(recipe) * optimizer,
        buckets=_num_buckets(recipe) * stored * bucket_elements(recipe),
        activations=tokens * _kept_bytes(recipe),
        gathered=stored * gathered,
        update=0 if training.offload_optimizer else _update_bytes(recipe, optimizer),
    )


def accumulates(recipe: Recipe, workers: int) -> bool:
    """Whether gradients of a micro-batch are added to those of others."""
    return recipe.accumulation(workers) > 1


def _update_bytes(recipe: Recipe, elements: float) -> float:
    """Gradients of a worker's share of the optimizer: as they came, put together, and in fp32.

    Args:
        elements: of its share.
    """
    rounded = recipe.training.precision != "fp32"
    stored = DTYPES[recipe.training.precision].itemsize
    if recipe.training.zero_stage == 0:
        sent = stored * min(elements, FLAT_ELEMENTS)
        return stored * elements + max(sent, 4 * elements if rounded else 0)
    put_together = stored if rounded and recipe.training.zero_stage < 3 else 0
    # Muon's in bf16: of all ranks, the worker's own, and those once more while they are sent.
    directions = 2 * in_matrices(recipe) * (count_parameters(recipe.model) + 2 * elements)
    return (stored + put_together + 4) * elements + directions


def bucket_elements(recipe: Recipe) -> int:
    """Elements of a bucket, for which DeepSpeed makes room whether there is so much or not."""
    return min(recipe.training.bucket_elements, count_parameters(recipe.model))


def overlaps(training: TrainingSettings, device: str) -> bool:
    """Whether gradients travel while the backward pass goes on; on CPUs it goes through them."""
    return training.overlap_comm and device == "cuda"


def _num_buckets(recipe: Recipe) -> int:
    """Buckets that DeepSpeed holds in the backward pass (stage_1_and_2.py, stage3.py)."""
    stage, on_gpus = recipe.training.zero_stage, recipe.cluster.device != "cpu"
    if stage == 0:
        return 0
    return 1 + (stage < 3 and overlaps(recipe.training, "cuda" if on_gpus else "cpu"))


def _kept_bytes(recipe: Recipe) -> float:
    """Bytes of activations for each token; of one layer and of all inputs where they are saved."""
    model, dtype = recipe.model, DTYPES[recipe.training.precision]
    if not recipe.training.checkpoint_activations:
        return activation_bytes(model, dtype)
    one_layer = activation_bytes(model.model_copy(update={"layers": 1}), dtype)
    return one_layer + (model.layers - 1) * model.width * dtype.itemsize


def activation_bytes(settings: AnyShape, dtype: torch.dtype) -> float:
    """Bytes that autograd keeps for each token of a forward pass.

    Counted, not modelled: models of one and of two layers run on the CPU, and every tensor that is
    saved for the backward pass, parameters apart, is added up once.
    """
    one, two = (
        _saved_bytes(settings.model_copy(update={"layers": layers}), dtype) for layers in (1, 2)
    )
    return (one + (settings.layers - 1) * (two - one)) / sum(PROBE_SEQUENCES)


def _saved_bytes(settings: AnyShape, dtype: torch.dtype) -> int:
    model = make_model(settings).initialise(0).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept = []  # else a freed tensor's address could be another's

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    alphabet = settings.alphabet
    tokens = torch.randint(4, 24, (sum(PROBE_SEQUENCES),))
    at = torch.nonzero(torch.rand(len(tokens)) < 0.15)[:, 0]
    targets = Targets(at, tokens[at])
    tokens[at] = alphabet.mask
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(Packed(tokens, PROBE_SEQUENCES), targets)
    return sum(saved.values())


def step_flops(settings: AnyShape, batch: BatchShare) -> float:
    """Floating-point operations of one update: forward, and twice as much backward.

    Padding and recomputation do not count.
    """
    forward = settings.forward_flops(batch.num_tokens, batch.squared_lengths, batch.num_targets)
    return 3 * forward


PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362}
"""Dense bf16 and fp16 by NVIDIA's data sheets (SXM if there are several), by part of the name."""


def peak_flops(recipe: Recipe, device: str) -> float | None:
    """Operations a second of one worker's device at best; None where that is not known."""
    if recipe.cluster.peak_tflops is not None:
        return recipe.cluster.peak_tflops * 1e12
    if device != "cuda" or recipe.training.precision == "fp32":
        return None
    name = torch.cuda.get_device_name()  # not exercised without a GPU
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


SLOWEST_BYTES_S = 20e6
"""Of a checkpoint, all together; a storage that gives less is none to train with."""


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of one checkpoint: DeepSpeed's state of all ranks, and the bundle in fp32."""
    return sum(_saved_bytes_of(recipe))


def moving_s(recipe: Recipe) -> float:
    """Seconds that a checkpoint may be on its way to a storage or a node, converted there, before
    that passes for a hang."""
    return checkpoint_bytes(recipe) / SLOWEST_BYTES_S


def saved_bytes(recipe: Recipe, workers: int, rank: int) -> int:
    """Bytes that a rank writes of one: its shards, and rank 0 what is not cut up as well."""
    shards, whole = _saved_bytes_of(recipe)
    return -(-shards // workers) + (whole if rank == 0 else 0)


def in_matrices(recipe: Recipe) -> float:
    """Share of the parameters that Muon moves."""
    if recipe.optimizer.matrices == "adamw":
        return 0.0
    return count_in_matrices(recipe.model) / count_parameters(recipe.model)


def _saved_bytes_of(recipe: Recipe) -> tuple[int, int]:
    """What all ranks write a share of, and what rank 0 writes for all: with the bundle in fp32.

    That is optimizer state with the fp32 weights, and the weights as they are computed with; at
    stage 0 rank 0 writes both, at stage 3 the latter are not written.
    """
    stage, parameters = recipe.training.zero_stage, count_parameters(recipe.model)
    bundle, weights = 4, DTYPES[recipe.training.precision].itemsize
    if stage == 0:
        return 0, round(parameters * (bundle + weights + optimizer_bytes(recipe)))
    shards = round(parameters * optimizer_bytes(recipe))
    return shards, parameters * (bundle + (weights if stage < 3 else 0))


def optimizer_bytes(recipe: Recipe) -> float:
    """Of each parameter: Adam's two moments or Muon's one, and the fp32 weights that they update.

    In fp32 those are the model's own at stage 0, and copies of a worker's share at the others.
    """
    own = recipe.training.precision == "fp32" and recipe.training.zero_stage == 0
    return (8 if own else 12) - 4 * in_matrices(recipe)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_memory(recipe: Recipe, workers: int, rank: int) -> str:
    """One sentence for a worker that ran out of memory: what it holds, and what to lower."""
    memory = worker_memory(recipe, workers)
    return (
        f"Rank {rank} ran out of memory; by the estimate it holds {memory} and what the device's "
        f"own software takes: {_what_to_lower(recipe, asdict(memory))}."
    )


def _what_to_lower(recipe: Recipe, memory: dict[str, float]) -> str:
    training = recipe.training
    if memory["activations"] >= max(memory.values()):
        if not training.checkpoint_activations:
            return "resume with training.checkpoint_activations=true"
        if training.micro_batch_rows > 1:
            return f"resume with training.micro_batch_rows={training.micro_batch_rows // 2}"
    if training.zero_stage > 0 and not training.offload_optimizer:
        return "resume with training.offload_optimizer=true, or with more cluster.workers"
    if training.zero_stage == 3 and not training.offload_parameters:
        return "resume with training.offload_parameters=true, or with more cluster.workers"
    return "use more cluster.workers with training.zero_stage=3, or GPUs with more memory"
