"""The packed transformer against independent implementations, with the same random weights."""

import esm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EsmConfig, EsmForMaskedLM

from raptide.model.bundle import load_bundle
from raptide.model.config import ModelSettings
from raptide.model.packed import Packed
from raptide.model.transformer import Esm

LENGTHS = (5, 77, 30, 3, 128)


def random_tokens(alphabet, lengths=LENGTHS, seed=None):
    """Fresh random sequences with masks inside, specials around."""
    rng = np.random.default_rng(seed)
    pieces = []
    for length in lengths:
        residues = rng.integers(4, 29, length - alphabet.num_specials)
        residues[rng.random(len(residues)) < 0.15] = alphabet.mask
        pieces.append(torch.from_numpy(alphabet.add_specials(residues).astype(np.int64)))
    return pieces


def pad(pieces):
    """[n, longest] tokens padded with <pad>."""
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=1)


def pack(pieces):
    return Packed(torch.cat(pieces), tuple(map(len, pieces)))


def transformers_model(rotary):
    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=258,
        position_embedding_type="rotary" if rotary else "absolute",
        token_dropout=True,
        emb_layer_norm_before=not rotary,
        layer_norm_eps=1e-5,
        initializer_range=0.1,
    )
    model = EsmForMaskedLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases too, or their mapping goes untested
        if "layer_norm" in name.lower() or "LayerNorm" in name:
            parameter.data += 1
    return model


@pytest.mark.parametrize("rotary", [True, False], ids=["esm2", "esm1b"])
@torch.inference_mode()
def test_logits_and_layers_equal_transformers(rotary, tmp_path):
    theirs = transformers_model(rotary)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_bundle(tmp_path)
    pieces = random_tokens(ours.settings.alphabet)
    padded = pad(pieces)
    answer = theirs(padded, attention_mask=(padded != 1).long(), output_hidden_states=True)
    packed = pack(pieces)
    logits = ours(packed).split(packed.lengths)
    assert answer.logits.abs().max() > 1, "too flat to show a difference"
    for i, piece in enumerate(pieces):
        assert (answer.logits[i, : len(piece)] - logits[i]).abs().max() < 1e-4
    for layer, reference in enumerate(answer.hidden_states):
        (mine,) = ours.represent(packed, [layer])
        for i, piece in enumerate(mine.split(packed.lengths)):
            torch.testing.assert_close(piece, reference[i, : len(piece)], atol=1e-4, rtol=1e-4)


ESM1_NAMES = {
    "embed_tokens.weight": "embed.weight",
    "embed_out": "head_weight",
    "embed_out_bias": "head_bias",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "ffn_norm",
    "self_attn": "attention",
}


@torch.inference_mode()
def test_esm1_equals_fair_esm():
    args = esm.pretrained.Namespace(
        arch="protein_bert_base",
        layers=3,
        embed_dim=48,
        logit_bias=True,
        ffn_embed_dim=96,
        attention_heads=4,
        max_positions=256,
        emb_layer_norm_before=False,
        final_bias=True,
        token_dropout=False,
    )
    theirs = esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1")).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {}
    for name, tensor in theirs.state_dict().items():
        if "contact_head" in name or "embed_positions" in name:
            continue
        for old, new in ESM1_NAMES.items():
            if name == old or f".{old}." in name:
                name = name.replace(old, new)
        state[name] = tensor.flatten() if name.endswith(("bias_k", "bias_v")) else tensor
    settings = ModelSettings(family="esm1", layers=3, width=48, heads=4, ffn=96)
    ours = Esm(settings).eval()
    ours.load_state_dict(state)
    pieces = random_tokens(settings.alphabet)
    reference = theirs(pad(pieces))["logits"]
    packed = pack(pieces)
    for i, piece in enumerate(ours(packed).split(packed.lengths)):
        assert (piece - reference[i, : len(piece)]).abs().max() < 1e-4 * reference.abs().max()


SMALL = {
    family: Esm(ModelSettings(family=family, layers=2, width=32, heads=4)).initialise(1).eval()
    for family in ("esm1", "esm1b", "esm2")
}


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(sorted(SMALL)),
    lengths=st.lists(st.integers(3, 60), min_size=2, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
@torch.inference_mode()
def test_a_sequence_does_not_depend_on_its_batch_mates(family, lengths, seed):
    model = SMALL[family]
    pieces = random_tokens(model.settings.alphabet, lengths, seed)
    together = model(pack(pieces)).split([len(piece) for piece in pieces])
    assert torch.isfinite(torch.cat(together)).all()
    for piece, logits in zip(pieces, together, strict=True):
        torch.testing.assert_close(model(pack([piece])), logits, atol=1e-5, rtol=1e-5)


def test_the_loss_at_targets_is_the_cross_entropy_of_the_logits():
    model = SMALL["esm2"]
    packed = pack(random_tokens(model.settings.alphabet, seed=1))
    targets = torch.full_like(packed.tokens_T, -1)
    targets[::7] = packed.tokens_T[::7]
    expected = torch.nn.functional.cross_entropy(
        model(packed), targets, ignore_index=-1, reduction="none"
    )[::7]
    torch.testing.assert_close(model(packed, targets), expected)
    none = model(packed, torch.full_like(targets, -1))
    assert none.shape == (0,)
    none.sum().backward()


def test_rotary_angles_stay_in_fp32_when_the_model_is_bf16():
    model = Esm(ModelSettings(layers=1, width=32, heads=4)).to(torch.bfloat16)
    assert model.inv_freq.dtype == torch.float32
    assert model.embed.weight.dtype == torch.bfloat16
