"""Runs of the LSTM by the same trainer: shown all, asked all, resumed to the bit."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from lone_worker import run_here
from small_runs import EVERY, as_recipe, losses, make_recipe

from raptide.alphabet import ESM_33, FIRST_RESIDUE, RESIDUES
from raptide.data.streaming.batch import Cursor, GlobalBatch, RowSettings, StreamSettings
from raptide.data.streaming.feeder import FeederActor
from raptide.data.streaming.rows import pack_block
from raptide.data.streaming.stream import Source, StreamPlan
from raptide.errors import CheckpointError, ConfigError
from raptide.inference.engine import Engine
from raptide.model.formats.detect import read_weights
from raptide.training import worker
from raptide.training.batches import cut_share
from raptide.training.checkpoints.owned import Storage
from raptide.training.planning.recipe import EvaluationSettings
from raptide.training.trainer import prepare_run
from raptide.training.watching.heldout import HeldoutEvaluator, heldout_rows
from raptide.training.watching.validation import evaluate_checkpoint

LSTM = {"family": "lstm", "layers": 2, "width": 64}
CPU = torch.device("cpu")


def lstm_recipe(corpus, **training):
    tree = make_recipe(corpus, steps=2 * EVERY, **training) | {"model": LSTM}
    tree["optimizer"] = {"lr": 1e-2, "warmup_steps": 4}
    return as_recipe(tree, workers=1)


@pytest.fixture(scope="module")
def lstm_run(alone, corpus, tmp_path_factory):
    return run_here(lstm_recipe(corpus), tmp_path_factory.mktemp("lstm") / "run")


def hash_of(run):
    return hashlib.sha256((run.bundle / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_learns_and_its_bundle_opens(lstm_run):
    curve = losses(lstm_run.folder)
    assert curve[2 * EVERY] < curve[1] - 0.1
    assert 2 < lstm_run.heldout_ece.all_chosen < 25
    engine = Engine.load(lstm_run.bundle, dtype="fp32")
    assert engine.lineage["step"] == 2 * EVERY
    assert np.isfinite(engine.score_sequences(["MKTAYIAKQR"], "one-pass")).all()


def test_it_is_shown_all_by_its_run_and_by_evaluations_beside_it(lstm_run, corpus):
    recipe = lstm_recipe(corpus)
    plan = prepare_run(recipe, lstm_run.folder, resume=True)
    rows = heldout_rows(plan, recipe.evaluation)
    asked = rows, plan, recipe.training.micro_batch_rows, 0, 1
    model = read_weights(lstm_run.bundle).build()
    blind, shown = (
        HeldoutEvaluator(*asked, blind=b).measure(model, CPU).ece for b in (True, False)
    )
    assert blind.masked_only != pytest.approx(shown.masked_only, rel=1e-4)
    storage = Storage.of_run(lstm_run.folder)
    name = lstm_run.checkpoint.name
    threads = torch.get_num_threads()  # it sets them
    beside = evaluate_checkpoint._function(recipe, plan, storage, name, "cpu", threads).ece
    for found in (lstm_run.heldout_ece, beside):
        assert found.masked_only == pytest.approx(blind.masked_only, rel=1e-5)
        assert found.all_chosen == pytest.approx(blind.all_chosen, rel=1e-5)


class SpiedFeeder:
    """Starts feeders, and keeps what they were told."""

    def __init__(self):
        self.told = []

    def options(self, **options):
        self._options = options
        return self

    def remote(self, *arguments, **how):
        self.told.append(how)
        return FeederActor.options(**self._options).remote(*arguments, **how)


def test_a_resumed_run_ends_with_the_same_bits(lstm_run, corpus, tmp_path, monkeypatch):
    feeder = SpiedFeeder()
    monkeypatch.setattr(worker, "FeederActor", feeder)
    shorter = lstm_recipe(corpus)
    training = shorter.training.model_copy(update={"steps": EVERY})
    run_here(shorter.model_copy(update={"training": training}), tmp_path / "run", ray_data=True)
    resumed = run_here(lstm_recipe(corpus), tmp_path / "run", resume=True, ray_data=True)
    assert resumed.audit.digest == lstm_run.audit.digest
    assert hash_of(resumed) == hash_of(lstm_run)
    assert losses(resumed.folder) == losses(lstm_run.folder)
    assert [told["blind"] for told in feeder.told] == [True, True], "every residue is a target"


def test_a_run_stays_with_its_family(lstm_run, corpus):
    other = as_recipe(make_recipe(corpus), workers=1)
    with pytest.raises(CheckpointError, match=r"saved with model.family=lstm, which a resumed"):
        prepare_run(other, lstm_run.folder, resume=True)
    tree = make_recipe(corpus) | {"init_from": str(lstm_run.folder)}
    with pytest.raises(ConfigError, match=r"has model.family lstm, but the recipe asks for esm2"):
        prepare_run(as_recipe(tree, workers=1), lstm_run.folder.parent / "other")


@pytest.mark.parametrize(
    ("stage", "precision", "tolerance"), [(3, "fp32", 1e-4), (2, "bf16", 3e-2)]
)
def test_stages_and_precisions_train_alike(lstm_run, corpus, tmp_path, stage, precision, tolerance):
    options = {"zero3_keep_whole_below": 0} if stage == 3 else {"checkpoint_activations": True}
    recipe = lstm_recipe(corpus, zero_stage=stage, precision=precision, **options)
    run = run_here(recipe, tmp_path / "run")
    curve = losses(lstm_run.folder)
    for step, loss in losses(run.folder).items():
        assert loss == pytest.approx(curve[step], abs=tolerance), f"step {step}"


def packed_rows(corpus, share):
    (block, *_) = corpus.blocks("train")
    settings = RowSettings(row_tokens=256, crop_tokens=128, mask_fraction=share)
    return pack_block(corpus.read_block(block), settings, ESM_33, 1, 0, 0)


def test_what_it_is_shown_does_not_depend_on_the_masks_and_all_of_it_is_asked(corpus):
    few, many = (packed_rows(corpus, share).uncovered() for share in (0.01, 0.9))
    np.testing.assert_array_equal(few.tokens, many.tokens)
    assert not (few.tokens == ESM_33.mask).any()
    np.testing.assert_array_equal(few.targets, many.targets)
    residues = (few.tokens >= FIRST_RESIDUE) & (few.tokens < FIRST_RESIDUE + len(RESIDUES))
    np.testing.assert_array_equal(few.targets[residues], few.tokens[residues])
    assert (few.targets[~residues] == ESM_33.pad).all()


def test_a_share_counts_every_residue_as_a_target(corpus):
    rows = packed_rows(corpus, 0.15)
    batch = GlobalBatch(rows, np.zeros((len(rows.tokens), 3), np.int64), Cursor()).counted()
    bounds = [(0, len(rows.tokens))]
    share = cut_share(bounds, ESM_33, CPU, batch.uncovered())
    (micro,) = share.micro
    assert share.batch.num_targets == len(micro.targets.at_N) > 5 * batch.num_targets
    assert share.batch.num_tokens == batch.num_tokens
    asked = micro.packed.tokens_T[micro.targets.at_N]
    assert torch.equal(asked, micro.targets.true_N)


class Unigram(torch.nn.Module):
    """Predicts from the letter at the place itself; keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, packed):
        self.shown.append(packed)
        return torch.nn.functional.one_hot(packed.tokens_T, len(ESM_33)) * 50.0


def test_held_out_residues_are_the_transformers_in_a_clean_context(corpus):
    source = Source(str(corpus.path), corpus.digest, 1.0)
    settings = StreamSettings(row_tokens=256, crop_tokens=128, batch_rows=4)
    plan = StreamPlan(sources=(source,), settings=settings, alphabet="esm-33")
    rows = heldout_rows(plan, EvaluationSettings(blocks=1))
    masked, clean = Unigram(), Unigram()
    covered = HeldoutEvaluator(rows, plan, 4).measure(masked, CPU)
    uncovered = HeldoutEvaluator(rows, plan, 4, blind=True).measure(clean, CPU)
    shown, true = (torch.cat([each.tokens_T for each in m.shown]) for m in (masked, clean))
    assert (shown == ESM_33.mask).any()
    assert not (true == ESM_33.mask).any()
    everything = rows.uncovered()
    filled = everything.tokens != ESM_33.pad
    assert torch.equal(true, torch.from_numpy(everything.tokens[filled]).long())
    # Who sees what is asked copies all of it, at the masked places too, which stay the same ones.
    assert uncovered.ece.all_chosen == uncovered.ece.masked_only == pytest.approx(1)
    assert uncovered.accuracy == 1
    assert covered.ece.masked_only > 1e10
    assert covered.accuracy == 0
    json.dumps(dataclasses.asdict(uncovered))
