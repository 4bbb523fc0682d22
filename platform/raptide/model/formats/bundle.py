"""A model folder, the *bundle*: what training writes and everything else loads.

    config.json         the shape, as Hugging Face's EsmConfig
    model.safetensors   the weights, under Hugging Face's names; above 5 GB in shards with an index
    vocab.txt           the tokens, one a line
    raptide.json        lineage: corpus, run, step, code version
    check.json          a known sequence's answer (model/check.py)

`transformers.EsmForMaskedLM.from_pretrained` opens a bundle of ESM-1b or ESM-2 shape, and raptide
opens folders that transformers wrote: safetensors or .bin, whole or in shards, layer norms spelled
either way, with a language-model head or without (EsmModel, classifiers). ESM-1 and the LSTM, which
transformers does not know, have model types of raptide's own and keep its tensor names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raptide.errors import BundleError
from raptide.model.config import ModelSettings
from raptide.model.formats.names import INV_FREQ, Named, tensor_names
from raptide.model.formats.tensor_files import SHARD_BYTES, TensorWriter, read_folder
from raptide.model.shapes import FAMILIES, AnyShape, read_shape
from raptide.patience import patiently, read_surely, unreadable

CONFIG, VOCABULARY, LINEAGE = "config.json", "vocab.txt", "raptide.json"

OWN_TYPES = {"raptide-esm1": "esm1", "raptide-lstm": "lstm"}
"""Families by the model types that are ours."""

POSITION_IDS = "esm.embeddings.position_ids"
POSITION_TABLE = "esm.embeddings.position_embeddings.weight"
EMBEDDING = "embeddings.word_embeddings.weight"

SHARED_INV_FREQ = "esm.rotary_embeddings.inv_freq"
"""As transformers 5 holds them in memory, in place of the name it writes."""

OUTSIDE = ("lm_head.", "classifier.")
"""Modules that stand beside the encoder, not in it."""

OTHER_HEADS = ("classifier.", "esm.pooler.")
"""What transformers' classifiers and encoders hold beside the language model."""


def read_bundle(folder: Path) -> Named:
    """Read a model folder; the tensors keep the stored precision and are mapped, not copied.

    Raises:
        BundleError: a file is missing or damaged, or describes no model; the message names it.
    """
    settings = _from_config(_read_json(folder / CONFIG), folder / CONFIG)
    _check_vocabulary(folder / VOCABULARY, settings)
    tensors, source = read_folder(folder)
    left_out: tuple[str, ...] = ()
    if isinstance(settings, ModelSettings) and column(settings) == "hugging_face":
        tensors = _normalise(tensors, settings, source)
        left_out = tuple(sorted(name for name in tensors if name.startswith(OTHER_HEADS)))
        tensors = {name: tensors[name] for name in tensors if name not in left_out}
    lineage = _read_json(folder / LINEAGE) if (folder / LINEAGE).exists() else {}
    return Named(settings, tensors, column(settings), source, lineage, left_out)


class BundleWriter:
    """Writes a bundle whose tensors come one by one, in their precision."""

    def __init__(self, folder: Path, settings: AnyShape, shard_bytes: int = SHARD_BYTES) -> None:
        """
        Args:
            folder: a new one, or that of a model which is replaced.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings = folder, settings
        self._tensors = TensorWriter(folder, shard_bytes)
        self.names = tensor_names(settings, column(settings))
        """What each tensor of the model's state is called in a bundle."""
        self._dtype: torch.dtype | None = None
        self._architecture = "EsmModel"

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor under its name in a bundle; it must not change until `close`.

        Raises:
            OSError, SafetensorError: the file system refuses.
        """
        self._tensors.add(name, tensor)
        if name == self.names["embed.weight"]:
            self._dtype = tensor.dtype
        if name == self.names["head_bias"]:
            self._architecture = "EsmForMaskedLM"

    def close(self, lineage: Mapping[str, Any]) -> None:
        """Write what is left, and the description of all.

        Raises:
            OSError, SafetensorError: the file system refuses.
        """
        self._tensors.close()
        dtype = str(self._dtype).removeprefix("torch.")
        _write_json(self._folder / CONFIG, _to_config(self._settings, dtype, self._architecture))
        (self._folder / VOCABULARY).write_text("\n".join(self._settings.alphabet.tokens))
        _write_json(self._folder / LINEAGE, lineage)


def write_bundle(folder: Path, named: Named) -> None:
    """Write a bundle into an existing or new folder, in the precision of the tensors.

    Raises:
        OSError, SafetensorError: the file system refuses.
    """
    writer = BundleWriter(folder, named.settings)
    for name, tensor in named.tensors.items():
        writer.add(name, tensor)
    writer.close(named.lineage)


def column(settings: AnyShape) -> str:
    """Whose tensor names a bundle of this shape has: transformers does not know all families."""
    return "native" if settings.family in OWN_TYPES.values() else "hugging_face"


def _normalise(
    tensors: dict[str, torch.Tensor], settings: ModelSettings, source: Path
) -> dict[str, torch.Tensor]:
    """One spelling for all writers, and without what no model of the shape uses.

    An `EsmModel` has no `esm.` before its names, and modules around a model put theirs there.
    transformers writes layer norms as gamma/beta or as weight/bias. The position indices are not
    learned, and the published ESM-2 folders carry a position table from before the rotary ones.
    """
    clean: dict[str, torch.Tensor] = {}
    base = next((n.removesuffix(EMBEDDING) for n in tensors if n.endswith(EMBEDDING)), "esm.")
    for name, tensor in tensors.items():
        spelled = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        spelled = _without_wrapper(spelled, base)
        if spelled in clean:
            raise BundleError(f"{source} holds {spelled} twice, also as gamma or beta.")
        if spelled == POSITION_IDS or (spelled == POSITION_TABLE and settings.rotary):
            continue
        clean[spelled] = tensor
    return clean


def _without_wrapper(name: str, base: str) -> str:
    """A tensor's name as in `EsmForMaskedLM`.

    Args:
        base: what stands before the encoder's own names: nothing in an `EsmModel`, `model.esm.` in
            a module that keeps an `EsmForMaskedLM` as `model`.
    """
    outer = base.removesuffix("esm.")
    if name.startswith(base) and not name.removeprefix(base).startswith(OUTSIDE):
        name = "esm." + name.removeprefix(base)
    else:
        name = name.removeprefix(outer)
    return INV_FREQ["hugging_face"].format(layer="*") if name == SHARED_INV_FREQ else name


def _to_config(settings: AnyShape, dtype: str, architecture: str) -> dict[str, Any]:
    if not isinstance(settings, ModelSettings) or column(settings) == "native":
        kind = f"raptide-{settings.family}"
        return {"model_type": kind, "dtype": dtype, **settings.model_dump()}
    traits = settings.traits
    return {
        "architectures": [architecture],
        "model_type": "esm",
        "dtype": dtype,
        "vocab_size": len(settings.alphabet),
        "mask_token_id": settings.alphabet.mask,
        "pad_token_id": settings.alphabet.pad,
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.ffn_width,
        "max_position_embeddings": 2 + settings.max_positions,
        "position_embedding_type": "rotary" if settings.rotary else "absolute",
        "token_dropout": traits.token_dropout,
        "emb_layer_norm_before": traits.norm_before,
        "layer_norm_eps": settings.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
    }


def _from_config(config: dict[str, Any], source: Path) -> AnyShape:
    try:
        family = OWN_TYPES.get(config.get("model_type", ""))
        if family is not None:
            known = FAMILIES[family].model_fields
            return read_shape({name: config[name] for name in known if name in config})
        return _from_hugging_face(config, source)
    except KeyError as error:
        raise BundleError(f"{source} lacks the field {error}; copy it again.") from None
    except ValueError as error:  # pydantic's own, many lines long
        reason = " ".join(str(error).split())
        raise BundleError(f"{source} describes no model ({reason}).") from None


def _from_hugging_face(config: dict[str, Any], source: Path) -> ModelSettings:
    kind = (config.get("model_type"), config.get("vocab_size"), config.get("token_dropout"))
    if kind != ("esm", 33, True):
        raise BundleError(
            f"{source} is no ESM masked language model with 33 tokens and token dropout "
            f"(model_type, vocab_size, token_dropout: {kind})."
        )
    if config.get("rope_theta", 10000.0) != 10000.0:
        raise BundleError(f"{source}: rope_theta is {config['rope_theta']}, but ESM-2's is 10000.")
    rotary = config.get("position_embedding_type") == "rotary"
    norm_before = bool(config.get("emb_layer_norm_before"))
    if rotary and norm_before:
        raise BundleError(
            f"{source}: emb_layer_norm_before belongs to ESM-1b (absolute positions) and not to "
            "ESM-2 (rotary positions); this mixture is not supported."
        )
    return ModelSettings(
        family="esm2" if rotary else "esm1b",
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        norm_eps=config["layer_norm_eps"],
        max_positions=config["max_position_embeddings"] - 2,
        norm_before=None if rotary or norm_before else False,
    )


def _check_vocabulary(file: Path, settings: AnyShape) -> None:
    if not file.is_file():
        return
    if tuple(read_surely(str(file), file.read_text).split()) != settings.alphabet.tokens:
        raise BundleError(
            f"{file} is not the {len(settings.alphabet)}-token alphabet of the ESM models; a model "
            "with other tokens cannot be read."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(patiently(path.read_text))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{path.parent} holds no {path.name}; name a model folder, such as the model/ folder "
            "of a checkpoint, or a .pt file of fair-esm."
        ) from None
    except OSError as error:
        raise unreadable(str(path), error) from None
    except ValueError as error:
        raise BundleError(f"{path} is damaged ({error}); copy it again.") from None
    if not isinstance(tree, dict):
        raise BundleError(f"{path} must hold a JSON object; copy it again.")
    return tree


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(tree), indent=1) + "\n")
