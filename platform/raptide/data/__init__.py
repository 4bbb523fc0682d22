"""Proteins to global batches.

In: FASTA files and tables of clusters. Out: packed, masked rows, batch by batch.
The way: compressed, fasta_text, fasta, building, corpus, streaming.
"""
