"""A model folder, the *bundle*: what training writes and everything else loads.

    config.json         the shape, as Hugging Face's EsmConfig
    model.safetensors   the weights, under Hugging Face's names
    vocab.txt           the tokens, one a line
    raptide.json        lineage: corpus, run, step, code version

`transformers.EsmForMaskedLM.from_pretrained` opens a bundle of ESM-1b or ESM-2 shape, and raptide
opens folders that transformers wrote. ESM-1, which transformers does not know, keeps raptide's own
tensor names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raptide.errors import BundleError
from raptide.model.config import ModelSettings
from raptide.model.names import INV_FREQ, native_to_hugging_face, normalise_hugging_face
from raptide.model.transformer import Esm

CONFIG, WEIGHTS, VOCABULARY, LINEAGE = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "raptide.json",
)


def save_bundle(
    folder: str | Path,
    settings: ModelSettings,
    state: Mapping[str, torch.Tensor],
    lineage: Mapping[str, Any],
) -> None:
    """Write a bundle into an existing or new folder.

    Args:
        state: the tensors of `Esm.state_dict()`, on any device.
        lineage: where the weights come from; plain JSON values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = native_to_hugging_face(settings)
    tensors = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    dtype = next(iter(tensors.values())).dtype
    config = _to_config(settings, str(dtype).removeprefix("torch."))
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / VOCABULARY).write_text("\n".join(settings.alphabet.tokens))
    (folder / LINEAGE).write_text(json.dumps(dict(lineage), indent=1) + "\n")


def load_bundle(folder: str | Path) -> tuple[Esm, dict[str, Any]]:
    """Read a bundle; returns the model on the CPU in the stored precision, and its lineage.

    Raises:
        BundleError: a file or tensor is missing, unused or of another shape; the message names it.
    """
    folder = Path(folder)
    settings = _from_config(_read_json(folder / CONFIG), folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise BundleError(f"{folder} holds no {WEIGHTS}; name a folder that has one.") from None
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS} is damaged ({error}); copy it again.") from None
    model = Esm(settings)
    inv_freq = _fill(model, normalise_hugging_face(tensors), folder / WEIGHTS)
    if inv_freq is not None:
        model.inv_freq = inv_freq.float()
    lineage = _read_json(folder / LINEAGE) if (folder / LINEAGE).exists() else {}
    return model.eval(), lineage


def _fill(model: Esm, tensors: dict[str, torch.Tensor], source: Path) -> torch.Tensor | None:
    """Move the tensors into the model, each exactly once; returns the rotary frequencies."""
    inv_freq = tensors.pop(INV_FREQ, None)
    state = {}
    for name, parameter in model.state_dict().items():
        stored = native_to_hugging_face(model.settings)[name]
        if stored not in tensors:
            raise BundleError(f"{source} lacks the tensor {stored}, which config.json calls for.")
        tensor = tensors.pop(stored)
        if tensor.shape != parameter.shape:
            raise BundleError(
                f"{source}: {stored} has shape {tuple(tensor.shape)}, but config.json calls for "
                f"{tuple(parameter.shape)}."
            )
        state[name] = tensor
    if tensors:
        raise BundleError(f"{source} holds {sorted(tensors)[0]}, which config.json has no use for.")
    model.load_state_dict(state, assign=True)
    return inv_freq


def _to_config(settings: ModelSettings, dtype: str) -> dict[str, Any]:
    traits = settings.traits
    if settings.family == "esm1":
        return {"model_type": "raptide-esm1", "dtype": dtype, **settings.model_dump()}
    rotary = traits.positions == "rotary"
    return {
        "architectures": ["EsmForMaskedLM"],
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
        "position_embedding_type": "rotary" if rotary else "absolute",
        "token_dropout": traits.token_dropout,
        "emb_layer_norm_before": traits.norm_before,
        "layer_norm_eps": settings.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
    }


def _from_config(config: dict[str, Any], folder: Path) -> ModelSettings:
    if config.get("model_type") == "raptide-esm1":
        fields = {name: config[name] for name in ModelSettings.model_fields if name in config}
        return ModelSettings.model_validate(fields)
    kind = (config.get("model_type"), config.get("vocab_size"), config.get("token_dropout"))
    if kind != ("esm", 33, True):
        raise BundleError(
            f"{folder / CONFIG} is no ESM masked language model with 33 tokens and token dropout "
            f"(model_type, vocab_size, token_dropout: {kind})."
        )
    rotary = config.get("position_embedding_type") == "rotary"
    if bool(config.get("emb_layer_norm_before")) == rotary:
        raise BundleError(
            f"{folder / CONFIG}: emb_layer_norm_before belongs to ESM-1b (absolute positions) and "
            "not to ESM-2 (rotary positions); this mixture is not supported."
        )
    return ModelSettings(
        family="esm2" if rotary else "esm1b",
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        norm_eps=config["layer_norm_eps"],
        max_positions=config["max_position_embeddings"] - 2,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BundleError(
            f"{path.parent} holds no {path.name}; name a model folder, such as the model/ folder "
            "of a checkpoint."
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}).") from None
