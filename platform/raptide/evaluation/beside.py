"""A benchmark as a run's checkpoints are asked it while the training goes on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from raptide.bulk.work import Model
from raptide.evaluation.benchmark import Benchmark
from raptide.evaluation.cache import ResultCache
from raptide.evaluation.run import evaluate
from raptide.evaluation.subjects.model import ModelSubject
from raptide.evaluation.subjects.readers import HereReader

CACHE = "bench"
"""Folder in the run's, of what is made of the benchmark's data alone."""


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
        tasks = Benchmark.load(self.path).make(Path(self.folder) / CACHE)
        with tempfile.TemporaryDirectory() as scratch:  # nobody reads this checkpoint again
            cache, read = ResultCache(Path(scratch)), Path(scratch) / "read"
            subject = ModelSubject("checkpoint", Model.find(bundle), "fp32", HereReader(cpus), read)
            found = evaluate(tasks, [subject], cache, baselines=False).found
        mains = [(f.task.settings.name, main) for f in found if (main := f.result.main())]
        return {
            f"{task}/{main.measure.metric}": (
                *(main.value, main.low, main.high),
                main.measure.higher_is_better,
            )
            for task, main in mains
        }
