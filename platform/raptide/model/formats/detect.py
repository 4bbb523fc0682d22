"""The door to a model's files: tells which format a path is, and leads there and back.

    path ─ detect ─> bundle or fair_esm ─ place ─> checked weights ─ build ─> model
    path <─ detect ─ bundle or fair_esm <─ name ── weights

Each format is one file that knows neither the others nor what becomes of its tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from raptide.errors import BundleError
from raptide.model.check import CHECK, write_check
from raptide.model.formats import bundle, fair_esm
from raptide.model.formats.strangers import recognise
from raptide.model.formats.weights import Weights, name_tensors, place_tensors

Format = Literal["bundle", "fair_esm"]


def detect(path: Path) -> Format:
    """Which format a path holds, or shall hold: a .pt file is fair-esm's, all else a folder."""
    return "fair_esm" if path.suffix == ".pt" else "bundle"


def model_files(names: Iterable[str], file: str = "") -> list[str]:
    """Of the names in a folder, those that make a model.

    Args:
        file: the .pt file that is the model; "" means the folder is.
    """
    if file:
        wanted = {file, fair_esm.regression_file(Path(file)).name}
        return [name for name in names if name in wanted]
    names = list(names)
    plain = {bundle.CONFIG, bundle.VOCABULARY, bundle.LINEAGE, CHECK}
    kinds = (".safetensors", ".bin")
    kind = next((k for k in kinds if any(n.endswith(k) for n in names)), "")
    endings = (kind, f"{kind}.index.json")
    return [name for name in names if name in plain or (kind and name.endswith(endings))]


def model_in(folder: Path) -> Path:
    """The model in a folder of nothing but `model_files`: the folder, or the .pt file in it."""
    files = sorted(each for each in folder.glob("*.pt"))
    heads = {fair_esm.regression_file(each) for each in files}
    return next((each for each in files if each not in heads), folder)


def read_weights(path: str | Path) -> Weights:
    """Read a model folder, raptide's or transformers', or a .pt file of fair-esm.

    Raises:
        BundleError: it is none, and what it is instead; or a tensor is missing, unused or of
            another shape.
    """
    path = Path(path)
    readers = {"bundle": bundle.read_bundle, "fair_esm": fair_esm.read_fair_esm}
    try:
        return place_tensors(readers[detect(path)](path))
    except BundleError as error:
        raise BundleError(recognise(path) or str(error)) from None


def write_weights(path: str | Path, weights: Weights) -> None:
    """Write a model folder, or a .pt file that fair-esm opens, in the precision of the tensors.

    The answer on record in a folder is that of the file, so it is computed from what was just
    written.

    Raises:
        BundleError: fair-esm would not take the file for what it is; or the model answers a known
            sequence with something that is no number, and the folder is gone.
    """
    path = Path(path)
    if detect(path) == "fair_esm":
        fair_esm.write_fair_esm(path, name_tensors(weights, fair_esm.COLUMN))
    else:
        new = not path.exists()
        bundle.write_bundle(path, name_tensors(weights, bundle.column(weights.settings)))
        try:
            write_check(path, read_weights(path).build())
        except BundleError:
            if new:
                shutil.rmtree(path)
            raise
