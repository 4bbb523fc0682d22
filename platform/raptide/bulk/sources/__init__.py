"""Where records come from: what people name as input, cut into units and read unit by unit.

In: paths, folders, globs, URIs, pipes, corpora. Out: surveys, and the records of any units.
The way: find, then one module for each kind of source.
"""
