"""Models as files: raptide's and transformers' folders, fair-esm's .pt files.

In: a path. Out: a model's weights, every tensor checked; and the same way back.
The way: detect, bundle or fair_esm, tensor_files, names, weights.
"""
