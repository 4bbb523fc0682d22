"""The packed transformer against independent implementations, with the same random weights."""

import subprocess
import sys
import textwrap

import pytest
import torch
from budgets import examples
from draws import pack, pad, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from transformers import EsmForMaskedLM, EsmModel
from transformers_shapes import esm_config

from raptide.model.config import ModelSettings
from raptide.model.contacts import corrected_maps
from raptide.model.device import CPU_SIZES, token_chunks
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.packed import Targets
from raptide.model.transformer import Esm


def transformers_model(rotary, **options):
    shape = {"layers": 3, "width": 64, "positions": 256, "initializer_range": 0.1}
    config = esm_config(rotary=rotary, **shape, **options)
    model = EsmForMaskedLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases too, or their mapping goes untested
        if "layer_norm" in name.lower() or "LayerNorm" in name:
            parameter.data += 1
    return model


BOTH = pytest.mark.parametrize("rotary", [True, False], ids=["esm2", "esm1b"])


@BOTH
@torch.inference_mode()
def test_logits_and_layers_equal_transformers(rotary, tmp_path):
    theirs = transformers_model(rotary)
    theirs.save_pretrained(tmp_path)
    ours = read_weights(tmp_path).build()
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


@BOTH
@torch.inference_mode()
def test_the_bare_encoder_and_its_contacts_equal_transformers(rotary, tmp_path):
    theirs = transformers_model(rotary, attn_implementation="eager")
    theirs.esm.contact_head.regression.weight.normal_(std=20)
    theirs.save_pretrained(tmp_path)
    ours = read_weights(tmp_path).build()
    bare = EsmModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert ours.contact_head is not None
    for piece in random_tokens(ours.settings.alphabet):
        packed = pack([piece])
        (last,) = ours.represent(packed, [3])
        hidden = bare(piece[None]).last_hidden_state[0]
        torch.testing.assert_close(last, hidden, atol=1e-4, rtol=1e-4)
        mask = torch.ones_like(piece)[None]
        expected = theirs.predict_contacts(piece[None], mask)[0]
        mine = ours.contact_head.probabilities(corrected_maps(ours.attention_maps(packed), True))
        assert (mine - expected).abs().max() < 1e-4
        assert len(mine) < 10 or expected.std() > 0.05, "too flat to show a difference"


@BOTH
@pytest.mark.parametrize("shard", [None, "40KB"], ids=["one-file", "shards"])
def test_a_folder_that_transformers_wrote_comes_back_bit_for_bit(rotary, shard, tmp_path):
    """Read, written by us, and opened by transformers again: the same bits, frequencies too."""
    theirs = transformers_model(rotary)
    if rotary:  # the published ones carry the rounding of fp16
        frequencies = theirs.esm.rotary_embeddings.inv_freq
        frequencies.copy_(frequencies.half().float())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard or "1GB")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (shard is not None)
    weights = read_weights(tmp_path / "theirs")
    write_weights(tmp_path / "ours", weights)
    again = EsmForMaskedLM.from_pretrained(tmp_path / "ours").state_dict()
    expected = theirs.state_dict()
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
    if rotary:
        assert torch.equal(weights.build().inv_freq, frequencies)


SMALL = {
    family: Esm(ModelSettings(family=family, layers=2, width=32, heads=4)).initialise(1).eval()
    for family in ("esm1", "esm1b", "esm2")
}


@examples(30)
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


@pytest.mark.parametrize("family", sorted(SMALL))
@pytest.mark.parametrize("total", [6, 17, 64, 129, 640, 1300])
def test_inference_in_pieces_equals_all_tokens_at_once(family, total):
    model = SMALL[family]
    packed = pack(random_tokens(model.settings.alphabet, (total // 2, total - total // 2)))
    with torch.no_grad():
        whole = model(packed)
    with torch.inference_mode():
        torch.testing.assert_close(model(packed), whole, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@given(st.integers(0, 5000))
def test_pieces_cover_all_tokens_in_few_sizes_with_little_padding(total):
    pieces = list(token_chunks(torch.empty(total, 1)))
    assert [start for start, _, _ in pieces[1:]] == [stop for _, stop, _ in pieces[:-1]]
    assert pieces[0][0] == 0
    assert pieces[-1][1] == total
    assert {size for _, _, size in pieces} <= {*CPU_SIZES, 0}
    padding = sum(size - (stop - start) for start, stop, size in pieces)
    assert 0 <= padding < 64


@torch.inference_mode()
def test_compiled_layers_give_the_same_numbers():
    """What is done on GPUs, where it pays."""
    model = Esm(ModelSettings(layers=1, width=32, heads=4)).initialise(1).eval()
    packed = [pack(random_tokens(model.settings.alphabet, n)) for n in ((9, 30), (600, 7))]
    expected = [model(each) for each in packed]
    model.compile_layers()
    for each, logits in zip(packed, expected, strict=True):
        torch.testing.assert_close(model(each), logits, atol=1e-5, rtol=1e-5)


def test_memory_does_not_grow_with_the_number_of_batch_sizes_seen():
    """Each new number of rows in a bf16 product would cost 0.7 MB for good."""
    script = """
        import resource, torch
        from raptide.model.config import ModelSettings
        from raptide.model.packed import Packed
        from raptide.model.transformer import Esm

        settings = ModelSettings(layers=1, width=480, heads=20)
        model = Esm(settings).initialise(1).bfloat16().eval()
        with torch.inference_mode():
            for length in (16, 64, 128, 256, 512, 1023):
                model(Packed(torch.full((length,), 5), (length,)))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for length in range(20, 330, 2):
                model(Packed(torch.full((length,), 5), (length,)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    grown_kb = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kb < 60_000


def test_the_loss_at_targets_is_the_cross_entropy_of_the_logits():
    model = SMALL["esm2"]
    packed = pack(random_tokens(model.settings.alphabet, seed=1))
    true = torch.full_like(packed.tokens_T, -1)
    true[::7] = packed.tokens_T[::7]
    expected = torch.nn.functional.cross_entropy(
        model(packed), true, ignore_index=-1, reduction="none"
    )[::7]
    at = torch.arange(len(true))[::7]
    torch.testing.assert_close(model(packed, Targets(at, true[at])), expected)
    none = model(packed, Targets(at[:0], true[:0]))
    assert none.shape == (0,)
    none.sum().backward()


def test_rotary_angles_stay_in_fp32_when_the_model_is_bf16():
    model = Esm(ModelSettings(layers=1, width=32, heads=4)).to(torch.bfloat16)
    assert model.inv_freq.dtype == torch.float32
    assert model.embed.weight.dtype == torch.bfloat16
