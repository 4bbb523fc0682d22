"""The .pt files of fair-esm: the published ESM-1, ESM-1b, ESM-1v and ESM-2 weights.

    esm2_t6_8M_UR50D.pt                      the model
    esm2_t6_8M_UR50D-contact-regression.pt   its contact head, beside it (ESM-1v has none)

They are read without unpickling anything but tensors, plain values and argparse namespaces.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from raptide.errors import BundleError
from raptide.model.config import ModelSettings
from raptide.model.formats.names import CONTACT_HEAD, Named, tensor_names
from raptide.model.formats.tensor_files import read_pickle

PREFIX = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.|decoder\.)")

ARCHITECTURES = {"protein_bert_base": "esm1", "roberta_large": "esm1b"}
"""What fair-esm's files call the families; those of ESM-2 have a `cfg` in place of an `arch`."""

COLUMN = "fair_esm"
"""Whose tensor names they are (names.py)."""

LINEAGE = "raptide"
"""Key of our own, where the weights come from; fair-esm passes over it."""

PLACEHOLDER = "embed_positions._float_tensor"
"""ESM-1 files hold this single number for no use."""


def regression_file(file: Path) -> Path:
    """Where fair-esm keeps the contact head that belongs to a model file."""
    return file.with_name(f"{file.stem}-contact-regression.pt")


def read_fair_esm(file: Path) -> Named:
    """Read a .pt file of fair-esm, with its contact head if that lies beside it.

    Raises:
        BundleError: it is no such file, or is damaged.
    """
    content = _read(file, "model file")
    tensors = {PREFIX.sub("", name): tensor for name, tensor in content["model"].items()}
    if regression_file(file).is_file():
        tensors |= _read(regression_file(file), "contact head")["model"]
    settings = _settings(content, tensors, file)
    if settings.family == "esm1":
        tensors.pop(PLACEHOLDER, None)
        # An output without a bias is one with a bias of zeros.
        dtype = tensors["embed_tokens.weight"].dtype
        tensors.setdefault("embed_out_bias", torch.zeros(len(settings.alphabet), dtype=dtype))
    if settings.family == "esm1b":
        _clear_mask_row(tensors, settings.alphabet.mask)
    return Named(settings, tensors, COLUMN, file, content.get(LINEAGE, {}))


def write_fair_esm(file: Path, named: Named) -> None:
    """Write a .pt file that `esm.pretrained.load_model_and_alphabet_local` opens.

    The contact head goes into a file beside it; fair-esm will not open a model without one.

    Raises:
        BundleError: fair-esm would not take the file for what it is.
    """
    settings = named.settings
    if not isinstance(settings, ModelSettings):
        raise BundleError(
            f"fair-esm knows the ESM families alone, but {file} would hold an LSTM; write a folder "
            "in its place."
        )
    if (settings.family == "esm2") != file.name.startswith("esm2"):
        raise BundleError(
            f"fair-esm tells ESM-2 from the others by file names that start with esm2, but "
            f"{file.name} would hold {settings.family}; choose another name."
        )
    tensors = dict(named.tensors)
    if tensor_names(settings, COLUMN)["head_bias"] not in tensors:
        raise BundleError(
            f"{file} would lack a language-model head, without which fair-esm opens no model; "
            "write a folder in its place."
        )
    regression = {n: tensors.pop(n) for n in list(tensors) if n.startswith(CONTACT_HEAD[COLUMN])}
    if settings.family == "esm1":
        tensors[PLACEHOLDER] = torch.zeros(1)
        for name in [n for n in tensors if n.endswith(("bias_k", "bias_v"))]:
            tensors[name] = tensors[name].view(1, 1, -1)
    if settings.traits.tied_head:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model = {_prefix(settings, name) + name: tensor for name, tensor in tensors.items()}
    torch.save({"model": model, **_describe(settings), LINEAGE: dict(named.lineage)}, file)
    if regression:
        torch.save({"model": regression}, regression_file(file))


def _read(file: Path, what: str) -> dict[str, Any]:
    content = read_pickle(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise BundleError(f"{file} is no {what} of fair-esm: it has no table `model`.")
    return content


def _settings(
    content: dict[str, Any], tensors: dict[str, torch.Tensor], file: Path
) -> ModelSettings:
    if "cfg" in content:
        family, values = "esm2", content["cfg"]["model"]
    else:
        values = content.get("args")
        family = ARCHITECTURES.get(getattr(values, "arch", ""), "")
    if not family or not isinstance(values, Namespace):
        raise BundleError(
            f"{file} is no ESM-1, ESM-1b, ESM-1v or ESM-2 model (arch "
            f"{getattr(values, 'arch', None)!r}); other models of fair-esm cannot be read."
        )
    found = {re.sub(r"^(encoder|decoder)_", "", name): v for name, v in vars(values).items()}
    _check_token_dropout(family, found, file)
    try:
        return ModelSettings(
            family=family,
            layers=found["layers"],
            width=tensors["embed_tokens.weight"].shape[1],
            heads=found["attention_heads"],
            ffn=tensors["layers.0.fc1.weight"].shape[0],
            max_positions=len(tensors["embed_positions.weight"]) - 2 if family == "esm1b" else 1024,
            norm_before=_norm_before(family, tensors),
        )
    except KeyError as error:
        raise BundleError(f"{file} lacks {error}; fetch it again.") from None


def _norm_before(family: str, tensors: dict[str, torch.Tensor]) -> bool | None:
    """ESM-1v is ESM-1b without the first layer norm; the tensor's presence decides."""
    absent = "emb_layer_norm_before.weight" not in tensors
    return False if family == "esm1b" and absent else None


def _check_token_dropout(family: str, found: dict[str, Any], file: Path) -> None:
    expected = family != "esm1"
    if bool(found.get("token_dropout", expected)) != expected:
        raise BundleError(
            f"{file} says token_dropout={not expected}, which no published {family} model does."
        )


def _clear_mask_row(tensors: dict[str, torch.Tensor], mask: int) -> None:
    """Zero the embedding of `<mask>`, as fair-esm does on loading ESM-1b; the head shares it."""
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name][mask] = 0


def _prefix(settings: ModelSettings, name: str) -> str:
    if settings.family == "esm1":
        return "decoder."
    return "encoder." if name.startswith("lm_head") else "encoder.sentence_encoder."


def _describe(settings: ModelSettings) -> dict[str, Any]:
    side = "decoder" if settings.family == "esm1" else "encoder"
    values = {
        f"{side}_layers": settings.layers,
        f"{side}_embed_dim": settings.width,
        f"{side}_ffn_embed_dim": settings.ffn_width,
        f"{side}_attention_heads": settings.heads,
        "max_positions": settings.max_positions,
        "token_dropout": settings.traits.token_dropout,
        "final_bias": True,
    }
    if settings.family == "esm2":
        return {"cfg": {"model": Namespace(**values)}}
    architecture = {family: arch for arch, family in ARCHITECTURES.items()}[settings.family]
    return {"args": Namespace(arch=architecture, **values)}
