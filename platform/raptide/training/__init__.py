"""Pretraining under Ray Train and DeepSpeed.

In: a recipe and a corpus. Out: a run folder with checkpoints, metrics and a loss curve.
The way: planning, trainer, worker, batches, step, checkpoints, watching.
"""
