"""What a path is that holds no model to open: one sentence, with the way from there to a model.

Asked only where nothing could be opened; nothing is unpickled but tensors and plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raptide.errors import BundleError
from raptide.model.formats.tensor_files import WEIGHTS, mentions, read_pickle, read_safetensors

BESIDE = (
    "save its state dict as model.safetensors or pytorch_model.bin beside the config.json of the "
    "model it was trained from, and name that folder"
)
FETCH = "name a folder with its model.safetensors or pytorch_model.bin, and config.json"
REPLACE = "put it in place of the table `model` in the fair-esm file it was trained from"
OURS = "name an ESM-1, ESM-1b, ESM-1v or ESM-2 model, or an LSTM of raptide's"
GATHER = f"gather it with its zero_to_fp32.py, {BESIDE}"

FOLDERS = [
    ("*.distcp", f"a sharded checkpoint of torch.distributed (FSDP); gather it there, {BESIDE}"),
    ("*/*.distcp", f"a sharded checkpoint of torch.distributed (FSDP); gather it there, {BESIDE}"),
    ("*_states.pt", f"a checkpoint of DeepSpeed; {GATHER}"),
    ("*/*_states.pt", f"a checkpoint of DeepSpeed; {GATHER}"),
    ("data/weights/*.pth", f"an ESM-3 or ESM-C model, whose architecture is another; {OURS}"),
    ("saved_model.pb", f"a model for TensorFlow; {FETCH}"),
]
"""Files that tell what a folder is."""

SUFFIXES = {
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".ot": "Rust",
    ".onnx": "ONNX",
    ".gguf": "llama.cpp (GGUF)",
}
"""Whose weights a file holds that neither PyTorch nor safetensors wrote."""

STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training loops keep a model's tensors."""

LIGHTNING = "pytorch-lightning_version"


def recognise(path: Path) -> str | None:
    """What a path holds in place of a model, and what to do; None if it cannot be told."""
    found = _folder(path) if path.is_dir() else _file(path) if path.is_file() else None
    return f"{path} is {found}." if found else None


def _folder(folder: Path) -> str | None:
    if (folder / "model" / "config.json").is_file():
        return f"a checkpoint; name the model in it, {folder / 'model'}"
    if (adapter := folder / "adapter_config.json").is_file():
        return _adapter(_read_json(adapter))
    config = _read_json(folder / "config.json")
    if config and (other := _other_architecture(config)):
        return other
    weights = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights and config:
        return None
    if weights:
        return (
            f"a folder with tensors ({weights}) but without the config.json that gives their "
            "shape; put that of the model they were trained from beside them"
        )
    names = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    if names:
        return f"a model for {SUFFIXES[Path(names[0]).suffix]} alone ({names[0]}); {FETCH}"
    return next((what for pattern, what in FOLDERS if any(folder.glob(pattern))), None)


def _adapter(config: dict[str, Any]) -> str:
    kind = "LoRA" if config.get("peft_type") == "LORA" else f"{config.get('peft_type')}"
    return (
        f"a {kind} adapter of {config.get('base_model_name_or_path')} and no whole model; merge it "
        "with peft's merge_and_unload(), save what that returns, and name the folder"
    )


def _other_architecture(config: dict[str, Any]) -> str | None:
    kind, names = config.get("model_type"), config.get("architectures") or []
    if "EsmForProteinFolding" in names:
        return (
            "ESMFold, which predicts structures; name the language model in it, which is published "
            "as facebook/esm2_t36_3B_UR50D"
        )
    if kind in ("esm", "raptide-esm1", "raptide-lstm"):
        return None
    return f"a model of another architecture ({', '.join(map(str, [kind, *names]))}); {OURS}"


def _file(file: Path) -> str | None:
    if file.suffix in SUFFIXES:
        return f"a model for {SUFFIXES[file.suffix]}; {FETCH}"
    in_folder = file.name.startswith(("model", "pytorch_model")) and file.suffix != ".pt"
    if in_folder and (file.parent / "config.json").is_file():
        return f"one file of a model folder; name the folder, {file.parent}"
    try:
        content = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    except BundleError:
        if mentions(file, LIGHTNING):
            return (
                "a Lightning checkpoint that holds more than tensors and plain values; open it "
                f"where it was trained, {BESIDE}"
            )
        content = {}
    found = _content(content) if isinstance(content, Mapping) else None
    if found is None and file.suffix != ".pt":
        return "no model; name a model folder, or a .pt file of fair-esm"
    return found


def _content(content: Mapping[Any, Any]) -> str | None:
    if "cfg" in content or "args" in content:
        return None  # fair-esm's, whose reader has said what is wrong
    if {"state", "param_groups"} <= set(content):
        return "the state of an optimizer, which holds no model; name the model saved beside it"
    if _is_state_dict(content):
        return _state_dict(content)
    key = next((key for key in STATE_DICTS if _is_state_dict(content.get(key))), None)
    if key is None:
        return None
    whose = "a Lightning" if LIGHTNING in content else "a training"
    return f"{whose} checkpoint, whose `{key}` is {_state_dict(content[key])}"


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(value, torch.Tensor) for value in content.values())
    )


def _state_dict(tensors: Mapping[str, torch.Tensor]) -> str:
    """What there is to say of tensors alone: neither heads nor the norms' epsilon are in them."""
    names = sorted(tensors)
    what = f"a state dict of {len(names)} tensors such as {names[0]}"
    if any(".lora_" in name for name in names):
        return f"{what}, a LoRA adapter; merge it into its base model, and name the merged folder"
    table = next((n for n in names if re.search(r"(word_embeddings|embed_tokens)\.weight$", n)), "")
    layers = {int(match[1]) for name in names if (match := re.search(r"layers?\.(\d+)\.", name))}
    if not table or not layers:
        return f"{what}, without a configuration; {BESIDE}"
    return (
        f"{what}, of {len(layers)} layers and width {tensors[table].shape[-1]}, without the "
        "configuration that says how many heads they have; "
        f"{REPLACE if 'embed_tokens' in table else BESIDE}"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
