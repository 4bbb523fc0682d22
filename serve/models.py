"""Models on their way to the replicas, by the digest of their files, where no run prunes them.

At the deploy `keep` puts a model's files on the shelf of the node that deploys, and where every
node finds them: in `staging` if that is set, else in the folder `served/` of the run they come
from. Each replica opens its own node's shelf, and what that lacks is fetched from there. What comes
from no run is fetched from the path or URI that was given, as long as it holds the same.
"""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

from raptide.errors import BundleError, ConfigError, RaptideError
from raptide.kept import CACHE, Shelf, link_or_copy
from raptide.model.formats.detect import model_files, model_in
from raptide.patience import reason_of
from raptide.storage import Storage, below, is_uri, storage_of
from serve.settings import ModelSettings, ServedModel

logger = logging.getLogger("ray.serve")

SERVED = "served"
"""Folder of a run for the models that were deployed from it; files there are hard links."""


def keep(model: ModelSettings, found: str, run: Path | None, staging: str | None) -> ServedModel:
    """Put a model by digest where no run prunes it.

    Args:
        found: a path or URI of a model folder or .pt file.
        run: the run that it comes from; its files are never written again, only deleted.

    Raises:
        ConfigError: there is no room for it on this node.
    """
    copy = partial(copy_model, found, link=run is not None)
    shelf = Shelf.of_node()
    try:
        digest = shelf.put(copy)
    except OSError as error:
        raise ConfigError(
            f"The files of model {model.name!r} cannot be kept in {shelf.folder} "
            f"({reason_of(error)}); make room there, or name another folder in {CACHE}."
        ) from None
    shelf.trim(model.model_cache_gb * 1e9)
    source, place = found, staging or (str(run / SERVED) if run else None)
    if place is not None:
        storage = storage_of(place, "staging")
        if storage.is_local:
            source = _stage(Shelf(Path(storage.path)), copy, model) or found
        else:
            _upload(shelf.folder / digest, storage, digest)
            source = below(place, digest)
    return ServedModel(**{**model.model_dump(), "path": source, "digest": digest})


def open_model(model: ModelSettings) -> Path:
    """A model's path on this node, which stays as long as this process.

    Raises:
        BundleError: it is neither on this node nor where it was fetched from.
    """
    if not isinstance(model, ServedModel):
        return Path(model.path)
    whole = model.path.partition("?")[0].endswith(model.digest)
    copy = partial(copy_model, model.path, link=whole, whole=whole)
    shelf = Shelf.of_node()
    try:
        folder = shelf.open(model.digest, copy)
    except (RaptideError, OSError) as error:
        raise BundleError(
            f"The files of model {model.name!r} are not on this node, and {model.path} does not "
            f"hold them any more ({error}); deploy it again, with `staging` at a folder or URI "
            "that every node reaches."
        ) from None
    shelf.trim(model.model_cache_gb * 1e9)
    return model_in(folder)


def copy_model(source: str, target: Path, *, link: bool = False, whole: bool = False) -> None:
    """Copy the files of a model into a folder on this node.

    Args:
        source: path or URI of a model folder or .pt file.
        link: hard links will do, where the file system has them.
        whole: the folder holds nothing but the model.
    """
    plain, mark, options = source.partition("?") if is_uri(source) else (source, "", "")
    folder, file = plain, ""
    if plain.endswith(".pt"):
        folder, _, file = plain.rpartition("/")
    storage = storage_of(folder + mark + options, "model")
    names = storage.names("")
    for name in names if whole else model_files(names, file):
        if link and storage.is_local:
            link_or_copy(Path(storage.full(name)), target / name)
        else:
            storage.fetch(name, target / name)


def _stage(shelf: Shelf, copy: partial[None], model: ModelSettings) -> str | None:
    """The folder on a shelf that every node reaches; None where this node may not write there."""
    try:
        folder = shelf.folder / shelf.put(copy)
    except OSError as error:
        logger.warning(
            "%s: %s cannot be written (%s), so nodes without the model fetch it from where it lies "
            "now; set `staging` to a folder or URI that may be.",
            model.name,
            shelf.folder,
            error.strerror,
        )
        return None
    shelf.trim(model.model_cache_gb * 1e9)
    return str(folder)


def _upload(folder: Path, storage: Storage, digest: str) -> None:
    for file in sorted(folder.iterdir()):
        if not storage.holds(f"{digest}/{file.name}"):
            with file.open("rb") as stream:
                storage.write(f"{digest}/{file.name}", partial(shutil.copyfileobj, stream))
