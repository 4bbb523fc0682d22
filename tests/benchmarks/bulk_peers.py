"""One way to embed a FASTA file in one process, for bench_bulk.py.

    python bulk_peers.py NAME MODEL FASTA OUTPUT ENGINES

Prints lines of JSON: `{"ready": ...}` when everything is loaded, `{"seconds": ...}` for the work.

raptide     the whole job, as jobs/embed_proteins.py runs it; says how far it is all along
engine      the bare engine on its share of the records, with its share of the cores
template    Ray Data and transformers as Anyscale's template for protein embeddings has them: four
            buckets by length, padded batches, one model an actor
fair-esm    fair-esm's scripts/extract.py: padded batches of 4,096 tokens, a file a record

Imports are inside: each runs with its own library alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TEMPLATE_BATCH = 16
TEMPLATE_BUCKETS = 4
EXTRACT_TOKENS = 4096


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def read(fasta: str) -> list[tuple[str, str]]:
    records = Path(fasta).read_text().split(">")[1:]
    parts = (record.split("\n", 1) for record in records)
    return [(header, letters.replace("\n", "")) for header, letters in parts]


def raptide(model: str, fasta: str, output: str, engines: int) -> None:
    import psutil

    from raptide.bulk import BulkSettings, EmbedWork, OutputFolder, find_sources, run_bulk
    from raptide.bulk.places import choose_precision
    from raptide.bulk.work import Model
    from raptide.cluster import ray_session

    found = Model.find(model)
    cores = psutil.cpu_count() or 1

    def watch(done: int, total: int, rate: float) -> None:
        say(done=done, total=total, rate=rate)

    with ray_session(num_cpus=cores + 1):
        outcome = run_bulk(
            EmbedWork(found, choose_precision("auto"), "window"),
            find_sources([fasta]),
            OutputFolder.at(output),
            BulkSettings(workers=engines, threads=found.threads),
            watch,
        )
    say(seconds=outcome.seconds, startup_s=outcome.startup_s, computed=outcome.computed_residues)


def engine(model: str, fasta: str, share: str, engines: int) -> None:
    """`share` as K/N: every N-th record from the K-th on, with an N-th of the cores."""
    import torch

    from raptide import Engine

    number, of = map(int, share.split("/"))
    torch.set_num_threads(max(1, engines // of))
    sequences = [letters for _, letters in read(fasta)][number::of]
    loaded = Engine.load(model, device="cpu")
    loaded.embed(sequences[:2], long="window")
    say(ready=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loaded.embed(sequences, long="window")
        say(seconds=time.perf_counter() - began)


class TemplateModel:
    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoTokenizer, EsmModel

        torch.set_num_threads(threads)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = EsmModel.from_pretrained(model, add_pooling_layer=False).eval()
        self._loaded = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        tokens = self._tokenizer(
            list(batch["sequence"]),
            padding=True,
            truncation=True,
            max_length=1024,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        batch["embedding"] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        batch["loaded"] = [self._loaded] * len(batch["sequence"])
        return batch


def template(model: str, fasta: str, output: str, engines: int) -> None:
    """Each bucket is written by a pipeline of its own; actors' start and models' loading, which
    happen once a bucket, are told by the actors and left out, as ours are."""
    import ray

    ray.init(num_cpus=engines + 1, include_dashboard=False, log_to_driver=False)
    records = [{"id": i, "sequence": s, "length": len(s)} for i, s in read(fasta)]
    data = ray.data.from_items(records).sort("length").repartition(TEMPLATE_BUCKETS)
    seconds = 0.0
    for number, bucket in enumerate(data.materialize().split(TEMPLATE_BUCKETS)):
        bucket.map_batches(
            TemplateModel,
            fn_constructor_args=(model, 1),
            batch_size=TEMPLATE_BATCH,
            compute=ray.data.ActorPoolStrategy(size=engines),
            num_cpus=1,
        ).write_parquet(f"{output}/{number}", mode="overwrite")
        ended = time.time()
        loaded = ray.data.read_parquet(f"{output}/{number}", columns=["loaded"]).min("loaded")
        seconds += ended - loaded
    say(seconds=seconds)


def fair_esm(model: str, fasta: str, output: str, engines: int) -> None:
    import esm
    import torch

    from raptide.model.formats.detect import read_weights
    from raptide.model.formats.weights import name_tensors

    torch.set_num_threads(engines)
    weights = read_weights(model)
    shape = weights.settings
    loaded = esm.ESM2(shape.layers, shape.width, shape.heads).eval()
    loaded.load_state_dict(name_tensors(weights, "fair_esm").tensors, strict=False)
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    data = esm.FastaBatchedDataset.from_file(fasta)
    batches = data.get_batch_indices(EXTRACT_TOKENS, extra_toks_per_seq=1)
    loader = torch.utils.data.DataLoader(
        data, collate_fn=alphabet.get_batch_converter(1022), batch_sampler=batches
    )
    Path(output).mkdir(parents=True)
    began = time.perf_counter()
    with torch.no_grad():
        for labels, letters, tokens in loader:
            found = loaded(tokens, repr_layers=[shape.layers])["representations"][shape.layers]
            for number, label in enumerate(labels):
                stop = min(1022, len(letters[number])) + 1
                answer = {"label": label, "mean": found[number, 1:stop].mean(0).clone()}
                torch.save(answer, f"{output}/{label.split()[0].replace('/', '_')}.pt")
    say(seconds=time.perf_counter() - began)


PEERS = {"raptide": raptide, "engine": engine, "template": template, "fair-esm": fair_esm}

if __name__ == "__main__":
    name, model, fasta, output, engines = sys.argv[1:]
    PEERS[name](model, fasta, output, int(engines))
