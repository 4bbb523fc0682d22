"""The LSTM: blind to what it predicts, alone in a pack, and the same as the formulas say."""

import numpy as np
import pytest
import torch
from draws import generator, pack

from raptide.config import parse_settings
from raptide.errors import ConfigError
from raptide.model.families import count_parameters, make_model
from raptide.model.lstm.config import LSTM_PRESETS, LstmSettings
from raptide.model.packed import Targets
from raptide.model.shapes import read_shape
from raptide.training.planning.recipe import Recipe


def a_model(layers=2, width=24, seed=1):
    model = make_model(LstmSettings(layers=layers, width=width)).initialise(seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases too, or theirs go untested
            parameter.mul_(2) if "bias" not in name else parameter.normal_(std=0.5)
    return model


def random_pieces(lengths):
    """Clean sequences; some are crops, without `<cls>` or `<eos>`."""
    return [torch.from_numpy(generator().integers(4, 24, length)) for length in lengths]


def random_lengths():
    return generator().integers(1, 40, generator().integers(2, 8)).tolist()


@torch.inference_mode()
def test_a_residue_changes_every_prediction_of_its_sequence_but_its_own():
    model = a_model()
    for _ in range(10):
        pieces = random_pieces(random_lengths())
        packed = pack(pieces)
        before = model(packed)
        place = int(generator().integers(len(packed.tokens_T)))
        changed = packed.tokens_T.clone()
        changed[place] = 4 + (changed[place] - 4 + 1) % 20
        differs = (model(pack(changed.split(packed.lengths))) != before).any(-1)
        mates = packed.sequence_T == packed.sequence_T[place]
        mates[place] = False
        assert torch.equal(differs, mates)


@torch.inference_mode()
def test_a_representation_has_seen_its_own_residue():
    model = a_model()
    (piece,) = random_pieces([20])
    (before,) = model.represent(pack([piece]), [2])
    piece[7] = 4 + (piece[7] - 4 + 1) % 20
    (after,) = model.represent(pack([piece]), [2])
    assert (before != after).any(-1).all()


@torch.inference_mode()
def test_a_sequence_gives_the_same_in_a_pack_and_alone():
    model = a_model(layers=3)
    for _ in range(10):
        pieces = random_pieces(random_lengths())
        together = model(pack(pieces)).split(list(map(len, pieces)))
        for piece, logits in zip(pieces, together, strict=True):
            torch.testing.assert_close(model(pack([piece])), logits, atol=1e-5, rtol=1e-5)


def slow_direction(model, name, tokens, part):
    """States [layers + 1][L, H] of one direction, a gate and a residue at a time, in float64."""
    half = model.settings.width // 2
    state = model.state_dict()
    rows = [state["embed.weight"].double().numpy()[token][part] for token in tokens]
    found = [rows]
    for layer in range(model.settings.layers):

        def of(kind, at=f"layers.{layer}.{name}"):
            return state[f"{at}.{kind}_l0"].double().numpy()

        hidden, cell, states = np.zeros(half), np.zeros(half), []
        for row in found[-1]:
            raw = of("weight_ih") @ row + of("bias_ih") + of("weight_hh") @ hidden + of("bias_hh")
            ingoing, forget, fresh, out = np.split(raw, 4)
            cell = cell / (1 + np.exp(-forget)) + np.tanh(fresh) / (1 + np.exp(-ingoing))
            hidden = np.tanh(cell) / (1 + np.exp(-out))
            states.append(hidden)
        found.append(states)
    return found


def slow(model, tokens):
    """Representations [layers + 1, L, D] and logits [L, V] of one sequence."""
    half = model.settings.width // 2
    onward = slow_direction(model, "onward", tokens, slice(0, half))
    back = slow_direction(model, "back", tokens[::-1], slice(half, None))
    back = [states[::-1] for states in back]
    layers = [
        np.concatenate([np.array(a), np.array(b)], -1) for a, b in zip(onward, back, strict=True)
    ]
    zero = np.zeros(half)
    weight = model.head_weight.detach().double().numpy()
    logits = []
    for i in range(len(tokens)):
        before = onward[-1][i - 1] if i > 0 else zero
        behind = back[-1][i + 1] if i + 1 < len(tokens) else zero
        logits.append(weight @ np.concatenate([before, behind]) + model.head_bias.detach().numpy())
    return np.array(layers), np.array(logits)


@torch.inference_mode()
def test_it_computes_what_the_formulas_say():
    """Hochreiter and Schmidhuber, 1997, with forget gates."""
    model = a_model(layers=3)
    pieces = random_pieces([1, 9, 2, 30])
    packed = pack(pieces)
    logits = model(packed).split(packed.lengths)
    layers = [each.split(packed.lengths) for each in model.represent(packed, [0, 1, 2, 3])]
    for i, piece in enumerate(pieces):
        expected_layers, expected = slow(model, piece.tolist())
        assert len(piece) < 9 or expected.std() > 0.3, "too flat to show a difference"
        np.testing.assert_allclose(logits[i], expected, atol=1e-5)
        for mine, theirs in zip(layers, expected_layers, strict=True):
            np.testing.assert_allclose(mine[i], theirs, atol=1e-5)


def test_the_loss_is_that_of_the_logits_at_the_targets():
    model = a_model()
    packed = pack(random_pieces([12, 5]))
    at = torch.tensor([0, 3, 14])
    loss = model(packed, Targets(at, packed.tokens_T[at]))
    log_p = torch.log_softmax(model(packed)[at], -1)
    torch.testing.assert_close(loss, -log_p.gather(1, packed.tokens_T[at, None])[:, 0])


def test_saved_activations_are_computed_again_to_the_same_gradients():
    packed = pack(random_pieces([12, 5, 30]))
    targets = Targets(torch.arange(47), packed.tokens_T)
    model, found = a_model(), []
    for checkpointed in (False, True):
        model.zero_grad()
        model.checkpoint_activations = checkpointed
        model(packed, targets).mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again)


@torch.inference_mode()
def test_bf16_is_near_fp32():
    model = a_model(width=64)
    packed = pack(random_pieces([50, 3, 20]))
    exact = torch.log_softmax(model(packed), -1)
    rounded = model.to(torch.bfloat16)(packed)
    assert rounded.dtype == torch.bfloat16
    assert (torch.log_softmax(rounded.float(), -1) - exact).abs().max() < 0.15


def test_presets_have_the_sizes_in_their_names():
    counts = {name: count_parameters(read_shape({"preset": name})) for name in LSTM_PRESETS}
    units = {"K": 1e3, "M": 1e6}
    for name, count in counts.items():
        size = name.rpartition("_")[2]
        assert count / (float(size[:-1]) * units[size[-1]]) == pytest.approx(1, abs=0.25), name
    assert counts["lstm_l3_28M"] / 1e6 == pytest.approx(28.4, abs=0.1)  # as in the paper's table
    assert counts["lstm_l3_113M"] / 1e6 == pytest.approx(113.4, abs=0.2)


RECIPE = {
    "name": "x",
    "corpus": "none",
    "training": {"steps": 1, "micro_batch_rows": 1},
    "cluster": {"workers": 1},
}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "lstm", "layers": 2, "width": 7}, "`model.width` is 7: must be even"),
        ({"family": "lstm", "layers": 2, "width": 8, "heads": 2}, "no setting `model.heads`"),
        ({"family": "gru", "layers": 2}, "one of esm1, esm1b, esm2, lstm, but is 'gru'"),
        ({"preset": "lstm_9"}, "preset must be one of esm1_t6_43M, .*lstm_l3_113M, but is"),
        ({"family": "lstm", "layers": 2}, "the setting `model.width` is required"),
    ],
)
def test_a_shape_that_is_none_is_one_sentence(model, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings(Recipe, RECIPE | {"model": model}, source="recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_recipe_keeps_its_family_when_it_is_written_and_read():
    tree = RECIPE | {"model": {"preset": "lstm_l2_1M", "layers": 1}}
    recipe = parse_settings(Recipe, tree, source="recipe.yaml")
    assert recipe.model == LstmSettings(layers=1, width=384)
    again = parse_settings(Recipe, recipe.model_dump(), source="recipe.yaml")
    assert again == recipe
