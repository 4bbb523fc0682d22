import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from budgets import examples
from draws import generator, random_sequence, random_weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import EsmForMaskedLM

from raptide.alphabet import RESIDUES
from raptide.errors import BundleError, ConfigError, SequenceError
from raptide.inference.batching import plan_batches
from raptide.inference.engine import CONTACT_RESIDUES, Engine
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    write_weights(folder, random_weights(layers=3, width=64, heads=4))
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder, device="cpu", dtype="fp32", max_batch_tokens=256)


@pytest.fixture(scope="module")
def reference(folder):
    return EsmForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def sequences():
    return [random_sequence(n) for n in (30, 1, 200, 7, 400, 64)]


def tokens_of(sequence):
    return torch.tensor([[0, *(4 + RESIDUES.index(c) for c in sequence), 2]])


@torch.inference_mode()
def test_embeddings_equal_transformers(engine, reference, sequences):
    mean = engine.embed(sequences)
    bos = engine.embed(sequences, pooling="bos")
    residue = engine.embed(sequences, layers=(0, 2, -1), pooling="residue")
    assert mean.shape == bos.shape == (len(sequences), engine.width)
    for i, sequence in enumerate(sequences):
        hidden = reference(tokens_of(sequence), output_hidden_states=True).hidden_states
        last = hidden[-1][0].numpy()
        np.testing.assert_allclose(mean[i], last[1:-1].mean(0), atol=1e-4)
        np.testing.assert_allclose(bos[i], last[0], atol=1e-4)
        assert residue[i].shape == (3, len(sequence), engine.width)
        for mine, layer in zip(residue[i], (0, 2, 3), strict=True):
            np.testing.assert_allclose(mine, hidden[layer][0, 1:-1].numpy(), atol=1e-4)


@torch.inference_mode()
def test_logits_and_contacts_equal_transformers(engine, reference, sequences):
    logits, contacts = engine.logits(sequences), engine.contacts(sequences)
    for i, sequence in enumerate(sequences):
        tokens = tokens_of(sequence)
        np.testing.assert_allclose(logits[i], reference(tokens).logits[0, 1:-1], atol=1e-4)
        expected = reference.predict_contacts(tokens, torch.ones_like(tokens))[0]
        np.testing.assert_allclose(contacts[i], expected, atol=1e-4)
    assert logits[0].shape == (30, len(engine.tokens))


def masked_log_p(reference, sequence):
    """[L, V]: each residue masked in a pass of its own, by transformers."""
    tokens = tokens_of(sequence)
    rows = []
    for position in range(1, len(sequence) + 1):
        masked = tokens.clone()
        masked[0, position] = 32
        rows.append(torch.log_softmax(reference(masked).logits[0, position], -1))
    return torch.stack(rows).double().numpy()


def picked(table, sequence):
    return table[range(len(sequence)), [4 + RESIDUES.index(c) for c in sequence]]


@torch.inference_mode()
def test_sequence_scores_equal_transformers(engine, reference):
    sequences = ["MKTWYLVAGE", random_sequence(90)]
    pseudo = engine.score_sequences(sequences)
    one_pass = engine.score_sequences(sequences, "one-pass")
    for i, sequence in enumerate(sequences):
        expected = picked(masked_log_p(reference, sequence), sequence).mean()
        assert pseudo[i] == pytest.approx(expected, abs=1e-5)
        log_p = torch.log_softmax(reference(tokens_of(sequence)).logits[0, 1:-1], -1).numpy()
        assert one_pass[i] == pytest.approx(picked(log_p, sequence).mean(), abs=1e-5)


@torch.inference_mode()
def test_variant_scores_equal_transformers_by_each_method(engine, reference):
    sequence = "MKTWYLVAGE"
    variants = ["K2A", "A8W:G9C", "m1m"]
    mutants = ["MATWYLVAGE", "MKTWYLVWCE", sequence]
    plain = torch.log_softmax(reference(tokens_of(sequence)).logits[0, 1:-1], -1).numpy()
    masked = masked_log_p(reference, sequence)

    def total(table, mutant):
        return (picked(table, mutant) - picked(table, sequence)).sum()

    own = picked(masked, sequence).sum()
    expected = {
        "wt-marginals": [total(plain, mutant) for mutant in mutants],
        "masked-marginals": [total(masked, mutant) for mutant in mutants],
        "pseudo-ppl": [picked(masked_log_p(reference, m), m).sum() - own for m in mutants],
    }
    for method, values in expected.items():
        np.testing.assert_allclose(
            engine.score_variants(sequence, variants, method), values, atol=1e-4
        )
    assert engine.score_variants(sequence, []).shape == (0,)


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals"])
def test_a_scan_holds_the_score_of_every_single_variant(engine, method):
    sequence = random_sequence(40)
    table = engine.scan(sequence, method)
    columns = "ACDEFGHIKLMNPQRSTVWY"
    variants = [f"{old}{i}{new}" for i, old in enumerate(sequence, 1) for new in columns]
    scores = engine.score_variants(sequence, variants, method)
    np.testing.assert_allclose(table.ravel(), scores, atol=1e-5)
    assert (table[range(40), [columns.index(c) for c in sequence]] == 0).all()


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("A2G", "'A2G' expects A at position 2, but the sequence has K there"),
        ("K2A:W3C", "'K2A:W3C' expects W at position 3, but the sequence has T there"),
        ("M0A", "position 0 is outside the sequence, whose residues are numbered 1 to 4"),
        ("M5A", "position 5 is outside"),
        ("K2A:K2G", "changes position 2 twice"),
        ("K2", "is written like A42G"),
        ("K2A,T3G", "is written like A42G"),
        ("", "is written like A42G"),
        ("K２A", "is written like A42G"),
        ("K2*", "is written like A42G"),
    ],
)
def test_a_variant_that_does_not_fit_says_why(engine, variant, message):
    with pytest.raises(SequenceError, match=message):
        engine.score_variants("MKTW", [variant])


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope="module")
def shape_35m(tmp_path_factory):
    folder = tmp_path_factory.mktemp("35m")
    settings = ModelSettings.model_validate({"preset": "esm2_t12_35M"})
    write_weights(folder, Weights.of(Esm(settings).initialise(1)))
    return folder


@pytest.mark.parametrize(("dtype", "others", "tolerance"), [("fp32", 40, 1e-5), ("bf16", 8, 2e-2)])
def test_numbers_do_not_depend_on_batch_mates_or_order(shape_35m, dtype, others, tolerance):
    """At the 35 M shape: alone, among many others (bf16 may be emulated), in another order."""
    engine = Engine.load(shape_35m, device="cpu", dtype=dtype)
    rng = generator()
    crowd = [random_sequence(int(n)) for n in rng.integers(1, 120, others)]
    mine = [random_sequence(n) for n in (5, 60, 333)]
    together = engine.embed([*crowd, *mine])[-3:]
    shuffled = engine.embed([*mine[::-1], *crowd[::-1]])[:3][::-1]
    alone = np.stack([engine.embed([sequence])[0] for sequence in mine])
    for other in (together, shuffled):
        relative = np.abs(other - alone).max(1) / np.abs(alone).max(1)
        assert relative.max() < tolerance
        assert cosine(other, alone).min() > 0.9995


def test_scores_do_not_depend_on_batch_mates(engine, sequences):
    together = engine.score_sequences(sequences, "one-pass")
    alone = [engine.score_sequences([sequence], "one-pass")[0] for sequence in sequences]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_bf16_stays_close_to_fp32(shape_35m):
    full = Engine.load(shape_35m, device="cpu", dtype="fp32")
    half = Engine.load(shape_35m, device="cpu", dtype="bf16")
    assert (half.dtype, full.dtype) == ("bf16", "fp32")
    sequences = [random_sequence(n) for n in (1, 20, 100, 500)]
    for pooling in ("mean", "bos"):
        a, b = (e.embed(sequences, pooling=pooling) for e in (full, half))
        assert cosine(a, b).min() > 0.9995
    for a, b in zip(*(e.embed(sequences, pooling="residue") for e in (full, half)), strict=True):
        assert cosine(a, b).min() > 0.999


def test_an_iterator_gives_an_iterator_that_reads_ahead_a_bounded_part(engine, sequences):
    taken = []

    def endless():
        for sequence in itertools.cycle(sequences):
            taken.append(sequence)
            yield sequence

    expected = engine.embed(sequences, pooling="residue")
    stream = engine.embed(endless(), pooling="residue")
    for wanted in (*expected, *expected):
        np.testing.assert_allclose(next(stream), wanted, atol=1e-5)
    assert sum(map(len, taken)) < 16 * engine.max_batch_tokens + 400 + 1404
    for method in (engine.logits, engine.contacts, engine.score_sequences):
        # Scores take a pass for each residue.
        given = sequences if method != engine.score_sequences else [s[:30] for s in sequences]
        both = zip(method(iter(given)), method(given), strict=True)
        assert all(np.allclose(a, b, atol=1e-5) for a, b in both)
    with pytest.raises(SequenceError, match=r"Sequence 2: .* this one is empty"):
        list(engine.embed(iter(["MK", "AA", " "])))


FUZZED = st.lists(
    st.text("ACDEFGHIKLMNPQRSTVWYBJOUXZacdx \n", min_size=1, max_size=70)
    .filter(str.strip)
    .map(lambda text: text + "*" * (len(text) % 5 == 0)),
    max_size=9,
)


@pytest.fixture(scope="module")
def families():
    shapes = {"layers": 2, "width": 32, "heads": 4, "max_positions": 48}
    return [
        Engine(random_weights(family=family, **shapes).build().to(dtype), {}, CPU, 96)
        for family in ("esm1", "esm1b", "esm2")
        for dtype in (torch.float32, torch.bfloat16)
    ]


CPU = torch.device("cpu")


@examples(500)
@given(sequences=FUZZED, which=st.integers(0, 5), pooling=st.sampled_from(["mean", "bos"]))
def test_any_letters_lengths_and_batches_give_finite_numbers(families, sequences, which, pooling):
    engine = families[which]
    embedded = engine.embed(sequences, pooling=pooling, long="window")
    assert embedded.shape == (len(sequences), 32)
    assert np.isfinite(embedded).all()
    scores = engine.score_sequences(sequences, "one-pass", long="window")
    assert np.isfinite(scores).all()
    assert (scores < 0).all()
    if sequences:
        table = engine.scan(sequences[0], "masked-marginals", long="window")
        assert np.isfinite(table).all()


def test_bad_input_is_one_sentence(engine):
    for call, message in [
        (lambda: engine.embed(["MK", "MK?"]), r"Sequence 1: .*position 3 holds '\?'"),
        (lambda: engine.embed(["A" * 20000]), r'at most 16384 residues .*20000.*long="window"'),
        (lambda: engine.embed("MKT"), "one string was given"),
        (lambda: engine.embed(["MK", None]), "Sequence 1: a string .* but a NoneType was given"),
        (lambda: list(engine.embed(iter([b"MK"]))), "Sequence 0: .* but a bytes was given"),
        (lambda: engine.score_variants("MKT", "M1A"), "one string was given"),
        (lambda: engine.contacts(["A" * 2049]), f"at most {CONTACT_RESIDUES} residues"),
    ]:
        with pytest.raises(SequenceError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    for call, message in [
        (lambda: engine.embed(["MK"], layers=(4,)), "layers 0 to 3"),
        (lambda: engine.embed(["MK"], layers=()), "At least one layer"),
        (lambda: engine.embed(["MK"], pooling="max"), "one of 'mean', 'bos', 'residue'"),
        (lambda: engine.embed(["MK"], long="cut"), "one of 'error', 'window'"),
        (lambda: engine.score_sequences(["MK"], "ppl"), "one of 'pseudo-ppl', 'one-pass'"),
        (lambda: engine.score_variants("MK", [], "ppl"), "one of 'wt-marginals', 'masked"),
        (lambda: engine.scan("MK", "pseudo-ppl"), "one of 'wt-marginals', 'masked-marg"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()


def test_contacts_need_a_contact_head():
    weights = replace(random_weights(layers=1, width=32, heads=4), contact_head=None)
    with pytest.raises(BundleError, match="no contact head; fit one with"):
        Engine(weights.build(), {}, CPU, 64).contacts(["MK"])


def test_what_needs_a_language_model_head_says_so():
    weights = random_weights(layers=1, width=32, heads=4)
    body = {name: t for name, t in weights.state.items() if not name.startswith("head_")}
    engine = Engine(replace(weights, state=body).build(), {}, CPU, 64)
    whole = Engine(weights.build(), {}, CPU, 64)
    np.testing.assert_array_equal(engine.embed(["MKTA"]), whole.embed(["MKTA"]))
    np.testing.assert_array_equal(engine.contacts(["MKTA"])[0], whole.contacts(["MKTA"])[0])
    for call in (
        lambda: engine.logits(iter(["MKTA"])),
        lambda: engine.score_sequences(["MKTA"]),
        lambda: engine.score_sequences(iter(["MKTA"]), "one-pass"),
        lambda: engine.score_variants("MKTA", []),
        lambda: engine.scan("MKTA"),
        lambda: engine.masked_log_p([("MKTA", [0])]),
    ):
        with pytest.raises(BundleError, match="no language-model head, so it gives embeddings"):
            call()


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_batches_hold_everything_once_within_the_budget(lengths, budget):
    batches = list(plan_batches(lengths, budget))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        held = sum(lengths[i] for i in batch)
        assert held <= budget or len(batch) == 1


def test_lineage_travels_with_the_engine(engine):
    assert engine.lineage == {"step": 1}
    assert math.isfinite(engine.max_residues)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.score_variants("MKLV", ["M1A", float("nan")]), "string like A42G, but nan"),
        (lambda e: e.score_variants("MKLV", [None]), "string like A42G, but None"),
        (lambda e: e.score_variants("MKLV", {"a": "M1A"}), r"dict was given: use list"),
        (lambda e: e.score_variants("MKLV", ["M1234567890A"]), "position 123456789... is outside"),
        (lambda e: e.score_variants("MKLV", [f"M{'9' * 5000}A"]), "position 999999999... is out"),
        (lambda e: e.score_variants("MKLV", ["M000A"]), "position 0 is outside"),
        (lambda e: e.embed({"a": "MKLV"}), r"dict was given: use list\(it.values\(\)\)"),
        (lambda e: e.embed({"MKLV"}), "set was given, which has no order"),
        (lambda e: e.embed(["MKLV", float("nan")]), "Sequence 1: a string .* but a float"),
    ],
)
def test_what_is_no_list_of_strings_is_one_sentence(engine, call, message):
    with pytest.raises(SequenceError, match=message) as caught:
        call(engine)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [1, -1, "1", None, [1.5], [True], ["a"], [], np.array([])])
def test_layers_that_are_none_are_one_sentence(engine, layers):
    with pytest.raises(ConfigError, match="layer"):
        engine.embed(["MKLV"], layers=layers)


def test_layers_and_variants_come_from_numpy_too(engine):
    expected = engine.embed(["MKLV"], layers=(1, -1))
    np.testing.assert_array_equal(engine.embed(["MKLV"], layers=np.array([1, -1])), expected)
    variants = np.array(["M1A", "M0001A"])
    assert len(set(engine.score_variants("MKLV", variants).tolist())) == 1
