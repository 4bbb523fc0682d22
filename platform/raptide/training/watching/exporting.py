"""What Prometheus sees of a run. Ray exports every name with `ray_` before it, on the metrics port
of the node where rank 0 runs, with the label `run`: the name of the run's folder.

deploy/monitoring/ holds alerts and a dashboard of these names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from ray.util.metrics import Gauge

GAUGES: dict[str, tuple[str, str]] = {
    "trainer/global_step": ("raptide_train_step", "Steps done"),
    "train/loss": ("raptide_train_loss", "Loss of the newest step that was logged, nats"),
    "train/grad_norm": ("raptide_train_grad_norm", "Norm of the gradients before clipping"),
    "train/spikes": ("raptide_train_loss_spikes", "Jumps of the loss since the workers started"),
    "train/skipped_steps": ("raptide_train_skipped_steps", "Left out: gradients were no numbers"),
    "progress/tokens": ("raptide_train_tokens", "Tokens trained on, padding not counted"),
    "speed/step_s": ("raptide_train_step_seconds", "One step, seconds"),
    "speed/tokens_per_s": ("raptide_train_tokens_per_second", "Over all workers"),
    "speed/data_wait_fraction": ("raptide_train_data_wait_ratio", "Share of a step without data"),
    "speed/mfu": ("raptide_train_mfu_ratio", "Model FLOPs over the device's peak"),
    "speed/checkpoint_s": ("raptide_train_checkpoint_seconds", "Until a checkpoint counts"),
    "speed/checkpoint_stall_s": ("raptide_train_checkpoint_stall_seconds", "Training stood still"),
    "system/memory_gb": ("raptide_train_memory_gigabytes", "Peak of rank 0"),
    "system/workers": ("raptide_train_workers", "Training workers"),
    "system/restarts": ("raptide_train_restarts", "How often the workers were started again"),
    "eval/ece": ("raptide_train_heldout_ece", "Held-out ECE"),
}
"""Names and descriptions by the metric of docs/training.md; one that was never logged is absent."""

UPDATED = ("raptide_train_updated_timestamp_seconds", "When metrics were last logged, Unix time")
CHECKPOINT = (
    "raptide_train_checkpoint_timestamp_seconds",
    "When the newest checkpoint was begun, or the workers started, Unix time",
)

REFRESH_S = 5.0
"""Seconds between two settings of each gauge: Ray drops one that is not set within two of its
reporting intervals, which are of ten seconds."""


class RunExporter:
    """Keeps a run's newest metrics where Prometheus finds them, until it is closed."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._set({UPDATED: time.time(), CHECKPOINT: time.time()})
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()

    def export(self, metrics: Mapping[str, float]) -> None:
        """Show metrics by their names in docs/training.md; others than `GAUGES` are left out."""
        values = {GAUGES[name]: float(value) for name, value in metrics.items() if name in GAUGES}
        values[UPDATED] = time.time()
        if "speed/checkpoint_s" in metrics:  # one counts since the last call
            values[CHECKPOINT] = time.time() - metrics["speed/checkpoint_s"]
        self._set(values)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_S):
            self._set({})

    def _set(self, values: dict[tuple[str, str], float]) -> None:
        """Set every gauge there is a value for, with these values among them."""
        with self._lock:
            self._values |= values
            for (name, description), value in self._values.items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, description, tag_keys=("run",))
                self._gauges[name].set(value, tags=self._tags)
