"""Pretraining: a recipe becomes a run folder with checkpoints and metrics."""
