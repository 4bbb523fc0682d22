"""Convert a model between training checkpoints, bundles, Hugging Face folders and fair-esm files.

    python jobs/export_model.py runs/demo exported                        a run's newest checkpoint
    python jobs/export_model.py esm2_t12_35M_UR50D.pt exported            fair-esm to Hugging Face
    python jobs/export_model.py ./hugging-face-folder esm1b_copy.pt       and back
    python jobs/export_model.py exported smaller --dtype bf16
    python jobs/export_model.py runs/demo averaged --average 3            mean of its last three
    python jobs/export_model.py exported with-contacts --fit-contacts structures.parquet

SOURCE is a run, a checkpoint of any ZeRO stage, a bundle, a folder that transformers wrote
(safetensors or .bin, in one file or in shards), or a .pt file of fair-esm (its contact head is read
from NAME-contact-regression.pt beside it).

TARGET is a new folder, or a new file that ends in .pt. A folder is a bundle, which transformers
opens too (ESM-1 only raptide, as transformers does not know it); a .pt file is opened by fair-esm.
Weights are carried over bit for bit unless --dtype says otherwise. Every tensor must find its
place: one that is missing, left over or of another shape is an error that names it. Encoders and
classifiers (EsmModel, EsmForSequenceClassification, ...) become encoders, which embed; what else
they hold (poolers, classifiers) is left out, and named.

--average takes the mean of the weights in a run's last checkpoints, which may be better than the
last one while the rate is still high; checkpoint.keep says how many there are.

--fit-contacts takes a Parquet file with columns `sequence` and `cb_angstrom` (each residue's Cβ
coordinates, x y z one after the other in one list, NaN where unknown). The head is fitted to the
first --fit-proteins of them, as in the paper, and tried on as many of the next.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from commandline import job_parser, refuse_output, run_job
from raptide.errors import ConfigError, InputError
from raptide.inference.contact_fit import contact_map, fit_contacts, long_range_precision
from raptide.inference.engine import CONTACT_RESIDUES, Engine
from raptide.model.contacts import ContactHead
from raptide.model.formats.detect import write_weights
from raptide.model.formats.fair_esm import regression_file
from raptide.model.formats.weights import Weights
from raptide.training.checkpoints.export import read_average, read_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Example = tuple[str, np.ndarray]


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="as above")
    parser.add_argument("target", type=Path, metavar="TARGET", help="as above")
    group = parser.add_argument_group("what is written")
    group.add_argument("--dtype", choices=DTYPES, help="precision (default: as stored)")
    group.add_argument(
        "--average", type=int, metavar="N", help="mean of a run's last N checkpoints (at least 2)"
    )
    group.add_argument(
        "--fit-contacts", type=Path, metavar="PARQUET", help="fit a contact head to structures"
    )
    group.add_argument(
        "--fit-proteins", type=int, default=20, metavar="N", help="structures to fit to"
    )
    args = parser.parse_args()
    refuse_existing(args.target)
    refuse_output(args.target, "TARGET")
    if args.average is not None and args.average < 2:
        raise ConfigError(f"--average needs at least 2, but {args.average} was given.")
    weights = read_average(args.source, args.average) if args.average else read_model(args.source)
    if not weights.lineage:
        weights = replace(weights, lineage={"converted_from": args.source.name})
    if args.fit_contacts:
        head = fit_head(weights, args.fit_contacts, args.fit_proteins)
        weights = replace(weights, contact_head=head)
    if args.dtype:
        state = {name: tensor.to(DTYPES[args.dtype]) for name, tensor in weights.state.items()}
        weights = replace(weights, state=state)
    write(weights, args.target)
    print(summary(weights, args.source, args.target))


def refuse_existing(target: Path) -> None:
    for path in (target, regression_file(target)) if target.suffix == ".pt" else (target,):
        if path.exists():
            raise ConfigError(f"{path} exists already; remove it or choose another TARGET.")


def write(weights: Weights, target: Path) -> None:
    """Write beside the target first: under its name there is nothing or the whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_weights(partial / target.name, weights)
        for made in sorted(partial.iterdir()):
            made.rename(target.parent / made.name)
    finally:
        shutil.rmtree(partial)


def fit_head(weights: Weights, file: Path, proteins: int) -> ContactHead:
    """Fit on the first proteins of the file and report the precision on the next."""
    if proteins < 1:
        raise ConfigError(f"--fit-proteins needs at least 1, but {proteins} was given.")
    # fp32: the head is to serve every precision.
    model = replace(weights, state={n: t.float() for n, t in weights.state.items()}).build()
    engine = Engine(model, {}, torch.device("cpu"), 4096)
    limit = min(engine.max_residues, CONTACT_RESIDUES)
    examples = read_structures(file, limit)
    shown = tqdm(islice(examples, proteins), total=proteins, unit=" proteins")
    head = fit_contacts(engine, shown)
    model.contact_head = head
    used = int((head.weight != 0).sum())
    print(f"Contact head: {used} of {head.weight.numel()} attention heads take part.")
    precisions = [
        long_range_precision(engine.contacts([sequence])[0], contacts)
        for sequence, contacts in islice(examples, proteins)
    ]
    if precisions:
        print(
            f"Long-range precision of the top L on the next {len(precisions)} proteins of the "
            f"file: {100 * np.nanmean(precisions):.1f}%"
        )
    return head


def read_structures(file: Path, limit: int) -> Iterator[Example]:
    """Sequences of at most `limit` residues with their contact maps.

    Raises:
        InputError: the file is no such table.
    """
    try:
        table = pq.read_table(file, columns=["sequence", "cb_angstrom"])
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(
            f"{file} is no Parquet file with the columns sequence and cb_angstrom ({reason})."
        ) from None
    for number, row in enumerate(table.to_pylist()):
        sequence, flat = row["sequence"], np.array(row["cb_angstrom"], np.float32)
        if flat.size != 3 * len(sequence):
            raise InputError(
                f"{file}, row {number}: {len(sequence)} residues need {3 * len(sequence)} "
                f"coordinates, but there are {flat.size}."
            )
        if len(sequence) <= limit:
            yield sequence, contact_map(flat.reshape(-1, 3))


def summary(weights: Weights, source: Path, target: Path) -> str:
    settings = weights.settings
    parameters = sum(tensor.numel() for tensor in weights.state.values())
    dtype = str(weights.state["embed.weight"].dtype).removeprefix("torch.")
    head = "with" if weights.contact_head is not None else "without"
    headless = "" if weights.has_head else ", without language-model head"
    left_out = f"Left out: {', '.join(weights.left_out)}\n" if weights.left_out else ""
    opens = f"raptide.Engine.load({str(target)!r})"
    if target.suffix == ".pt" and weights.contact_head is not None:
        opens += f" or esm.pretrained.load_model_and_alphabet_local({str(target)!r})"
    elif target.suffix == ".pt":
        opens += "; fair-esm itself asks for a contact head (--fit-contacts)"
    return (
        f"{source} -> {target}\n"
        f"{settings.family}, {settings.layers} layers x {settings.width}, {parameters:,} "
        f"parameters, {dtype}, {head} contact head{headless}\n"
        f"{left_out}"
        f"Open it with {opens}"
    )


if __name__ == "__main__":
    run_job(main)
