"""Files of proteins to a corpus on disk, by Ray Data, in two passes.

In: FASTA files, cluster tables, settings. Out: shards of cluster rows, a manifest, a digest.
The way: fetch (or synthetic), records, cleaning, membership, survey, shuffle, shards, manifest.
"""
