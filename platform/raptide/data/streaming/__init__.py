"""A corpus to global batches, the same ones on any number of workers and after any restart.

In: one corpus or several, a seed, a cursor. Out: packed and masked rows, handed to each worker.
The way: rows, mixture, stream, feeder.
"""
