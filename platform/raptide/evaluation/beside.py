"""A benchmark as a run's checkpoints are asked it while the training goes on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from raptide.bulk.work import Model
from raptide.evaluation.benchmark import Benchmark
from raptide.evaluation.cache import ResultCache
from raptide.evaluation.run import evaluate
from raptide.evaluation.subjects.model import ModelSubject
from raptide.evaluation.subjects.readers import HereReader

CACHE = "bench"
"""Folder in the run's."""


@dataclass(frozen=True)
class RunBenchmark:
    """Asks a bundle a benchmark's tasks, without baselines. Safe to pickle."""

    path: str
    folder: str
    """Of the run."""

    def check(self) -> None:
        """Read the benchmark and all its data.

        Raises:
            InputError: something is missing, or is not what its task needs.
        """
        Benchmark.load(self.path).make(Path(self.folder) / CACHE)

    def __call__(self, bundle: Path, cpus: int) -> dict[str, tuple[float, float, float, bool]]:
        """Main metrics by task and metric: value, interval, whether higher is better."""
        cache = ResultCache(Path(self.folder) / CACHE)
        tasks = Benchmark.load(self.path).make(cache.folder)
        model = Model.find(bundle)
        scratch = cache.folder / f"read-{model.digest[:16]}"
        subject = ModelSubject("checkpoint", model, "fp32", HereReader(cpus), scratch)
        try:
            found = evaluate(tasks, [subject], cache, baselines=False).found
        finally:  # nobody reads this checkpoint again
            shutil.rmtree(scratch, ignore_errors=True)
        mains = [(f.task.settings.name, main) for f in found if (main := f.result.main())]
        return {
            f"{task}/{main.measure.metric}": (
                *(main.value, main.low, main.high),
                main.measure.higher_is_better,
            )
            for task, main in mains
        }
