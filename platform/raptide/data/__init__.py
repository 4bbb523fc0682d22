"""From FASTA files to global batches: fasta -> build -> corpus -> rows -> stream."""
