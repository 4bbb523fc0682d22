"""Files of named tensors: safetensors or PyTorch's own, whole or in shards with an index."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raptide.errors import BundleError
from raptide.patience import patiently, read_surely, unreadable

STEM = "model"
SAFETENSORS = f"{STEM}.safetensors"
BIN = "pytorch_model.bin"

WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", BIN, f"{BIN}.index.json")
"""What a model folder keeps its tensors in, the first that is there."""

PICKLE_BYTES = 1 << 24
"""Of a pickle, how much `mentions` looks at."""

SHARD_BYTES = 5 * 10**9
"""What one file of weights holds at most, but for a single larger tensor; others write the same."""


class TensorWriter:
    """Writes a model folder's tensors as they come, of which it holds no more than a file's.

    One safetensors file where all fit into it, else shards with an index, as transformers names
    and reads them. (While it writes, safetensors holds a file's tensors once more.)
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """
        Args:
            folder: exists; weights of another model in it are replaced by `close`.
        """
        self._folder, self._shard_bytes = folder, shard_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._held_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one more, which must not change until `close`; full files are written at once.

        Raises:
            OSError, SafetensorError: the file system refuses.
        """
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._shard_bytes:
            self._write()
        self._held[name] = tensor
        self._held_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is held, and give the files their names.

        Raises:
            OSError, SafetensorError: the file system refuses.
        """
        self._write()
        for stale in self._folder.glob(f"{STEM}*.safetensors*"):
            stale.unlink()
        places: dict[str, str] = {}
        count = len(self._shards)
        for number, (file, held) in enumerate(self._shards, start=1):
            name = f"{STEM}-{number:05}-of-{count:05}.safetensors" if count > 1 else SAFETENSORS
            file.rename(self._folder / name)
            places |= dict.fromkeys(held, name)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
            (self._folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=1))

    def _write(self) -> None:
        file = self._folder / f"{len(self._shards)}.partial"
        save_file(self._held, file, metadata={"format": "pt"})
        self._shards.append((file, list(self._held)))
        self._held, self._held_bytes = {}, 0


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """All tensors of a model folder, and the file (or index) they come from.

    Tensors of safetensors files are mapped from disk, not copied. PyTorch's files are opened
    without unpickling anything but tensors, and only where there are no safetensors.

    Raises:
        BundleError: there are none, a file is damaged, or the index contradicts its shards.
    """
    for name, read in ((SAFETENSORS, read_safetensors), (BIN, _read_bin)):
        if (folder / name).is_file():
            return read(folder / name), folder / name
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read), index
    raise BundleError(
        f"{folder} holds no {SAFETENSORS} (nor its index, nor {BIN}); name a folder that has one."
    )


def digest_weights(path: Path) -> str:
    """SHA-256 over the weight files of a model folder, or of a single file; 64 hex digits.

    Raises:
        BundleError: there are none.
        RaptideError: one cannot be read.
    """
    files = [path]
    if path.is_dir():
        patterns = ("model*.safetensors", "pytorch_model*.bin")
        files = next(filter(None, (sorted(path.glob(pattern)) for pattern in patterns)), [])
    whole = hashlib.sha256()
    for file in files:
        whole.update(read_surely(str(file), functools.partial(_digest, file)))
    if not files:
        raise BundleError(f"{path} holds no weights; name a model folder or a .pt file.")
    return whole.hexdigest()


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def read_pickle(file: Path) -> Any:
    """What a PyTorch file holds: tensors, plain containers and argparse namespaces, no more.

    Raises:
        BundleError: it is damaged, or would have to run code to be read.
        RaptideError: the file system does not give it out.
    """
    try:
        return patiently(functools.partial(_unpickle, file))
    except FileNotFoundError:
        raise BundleError(f"{file} does not exist; name a model file or folder.") from None
    except OSError as error:
        raise unreadable(str(file), error) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise BundleError(
            f"{file} is damaged, or holds more than tensors and plain values ({reason}); fetch it "
            "again from a source you trust."
        ) from None


def _unpickle(file: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def mentions(file: Path, word: str) -> bool:
    """Whether a string stands in a PyTorch file that cannot be read; nothing is unpickled."""
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(pickled) as stream:
                return word.encode() in stream.read(PICKLE_BYTES)
    except (OSError, zipfile.BadZipFile, StopIteration):
        return False


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped from disk.

    Raises:
        BundleError: it is damaged.
        RaptideError: the file system does not give it out.
    """
    try:
        return read_surely(str(file), functools.partial(load_file, file))
    except SafetensorError as error:
        raise BundleError(f"{file} is damaged ({error}); copy it again.") from None


def _read_bin(file: Path) -> dict[str, torch.Tensor]:
    tensors = read_pickle(file)
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise BundleError(f"{file} is no table of tensors; name a model folder.")
    return dict(tensors)


def _read_shards(index: Path, read: Callable[[Path], dict[str, torch.Tensor]]) -> Any:
    try:
        places = dict(json.loads(read_surely(str(index), index.read_text))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{index} is no index of shards; copy it again.") from None
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise BundleError(f"{index} names the shard {name}, which is not beside it.")
        held = read(shard)
        listed = {tensor for tensor, place in places.items() if place == name}
        if listed != set(held):
            odd = min(listed ^ set(held))
            raise BundleError(f"{index} and {name} disagree about the tensor {odd}; copy both.")
        tensors |= held
    return tensors
