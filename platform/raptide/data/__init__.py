"""Proteins to global batches.

In: FASTA files and tables of clusters. Out: packed, masked rows, batch by batch.
The way: fasta, building, corpus, streaming.
"""
