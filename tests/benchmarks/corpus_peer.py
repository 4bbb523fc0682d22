"""FASTA to Parquet of token ids as people do it now: `datasets.map` with EsmTokenizer.

python corpus_peer.py proteins.fasta tokens.parquet
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import needletail
from datasets import Dataset
from transformers import EsmTokenizer

from raptide.alphabet import ESM_33


def records(fasta: str) -> Iterator[dict[str, str]]:
    for record in needletail.parse_fastx_file(fasta):
        yield {"id": record.id.split(" ")[0], "sequence": record.seq}


def main() -> None:
    fasta, output = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = Path(scratch) / "vocab.txt"
        vocabulary.write_text("\n".join(ESM_33.tokens) + "\n")
        tokenizer = EsmTokenizer(str(vocabulary))
        proteins = Dataset.from_generator(records, gen_kwargs={"fasta": fasta})
        tokens = proteins.map(
            lambda batch: {"input_ids": tokenizer(batch["sequence"])["input_ids"]},
            batched=True,
            remove_columns=["sequence"],
            num_proc=len(os.sched_getaffinity(0)),
        )
        tokens.to_parquet(output)


if __name__ == "__main__":
    main()
