"""Checkpoints: written behind the training, verified, chosen, pruned, exported.

In: an engine's state and a cursor. Out: folders that count only when every file is there whole.
The way: scratch, saving, checkpoint, export.
"""
