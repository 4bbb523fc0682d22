import errno
import hashlib
import io
import json
import os
import threading

import pyarrow as pa
import pytest
from pyarrow.fs import PyFileSystem
from stumbles import Stumbling, hurry

from raptide.attempts import Attempt
from raptide.config import parse_settings
from raptide.errors import BundleError, CheckpointError, PassingTrouble, StorageStumbled
from raptide.training.checkpoints.checkpoint import (
    SavedCheckpoint,
    find_bundle,
    find_bundle_at,
    has_finished_one,
    newest_checkpoint,
    open_checkpoint,
)
from raptide.training.checkpoints.keeping import (
    amend_manifest,
    awaiting_evaluation,
    best_effort,
    prune,
)
from raptide.training.checkpoints.owned import (
    CHECKPOINTS,
    Storage,
    begin_attempt,
    checkpoint_name,
    counted_names,
)
from raptide.training.checkpoints.saving import send_folder
from raptide.training.checkpoints.scratch import scratch_folder
from raptide.training.planning.recipe import Recipe

FINGERPRINT = {"seed": 1, "batch_rows": 8}


def recipe(**training):
    tree = {"name": "x", "corpus": "x", "model": {"preset": "esm2_t6_8M"}}
    training = {"steps": 10, "zero_stage": 2, "micro_batch_rows": 4} | training
    tree |= {"training": training, "cluster": {"workers": 2}}
    return parse_settings(Recipe, tree, source="test")


def write_checkpoint(run, step, attempt=None, **changes):
    folder = run / CHECKPOINTS / checkpoint_name(step, attempt)
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "zero.pt").write_bytes(b"weights")
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("zero.pt", "model/config.json")
    }
    manifest = {
        "format_version": 1,
        "step": step,
        "wandb_run_id": "run",
        "cursor": {"epoch": 0, "block": 3, "row": step},
        "fingerprint": FINGERPRINT,
        "recipe": recipe().model_dump(),
        "files": files,
        "heldout_ece": None,
        "heldout_step": 0,
    } | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    return tmp_path


def newest(run, **kwargs):
    return newest_checkpoint(Storage.of(run / CHECKPOINTS), **kwargs)


def test_the_newest_complete_one_is_taken(run):
    saved = newest(run)
    assert (saved.step, saved.cursor.row) == (30, 30)
    assert find_bundle(run) == run.resolve() / CHECKPOINTS / "step-00000030/model"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "was not finished"),
        (lambda folder: (folder / "zero.pt").unlink(), "zero.pt is missing"),
        (lambda folder: (folder / "zero.pt").write_bytes(b"weightz"), "zero.pt is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_broken_one_is_skipped_by_name_and_the_one_before_is_used(run, damage, problem, capsys):
    folder = run / CHECKPOINTS / "step-00000030"
    damage(folder)
    assert newest(run).step == 20
    assert f"Skipping checkpoint step-00000030: {problem}" in capsys.readouterr().out.replace(
        "it has no manifest.json, so it ", ""
    ).replace("its manifest.json ", "")
    assert folder.exists(), "looking must not delete"


def in_storage(filesystem, folder, names):
    """A checkpoint with such files of DeepSpeed's, and a bundle."""
    made = folder / "made"
    for file in (*(f"zero/state/{name}" for name in names), "model/config.json"):
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        (made / file).write_text(file)
    storage = Storage(filesystem, str(folder / "storage"))
    files = send_folder(made, storage, "step-00000001")
    return SavedCheckpoint(storage, "step-00000001", {"files": files, "wandb_run_id": "run"})


def files_below(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def another_node(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class Together(Stumbling):
    """Opens no file for reading until another one is opened."""

    def __init__(self, readers):
        super().__init__(0)
        self.barrier = threading.Barrier(readers)

    def open_input_stream(self, path):
        self.barrier.wait(timeout=20)
        return super().open_input_stream(path)


@pytest.mark.usefixtures("another_node")
def test_files_are_fetched_many_at_once(tmp_path):
    names = [f"file-{number}" for number in range(7)]
    saved = in_storage(PyFileSystem(Together(8)), tmp_path, names)
    saved.copy_to(tmp_path / "copy")
    assert files_below(tmp_path / "copy") == set(saved.manifest["files"])


class Damaging(Stumbling):
    """Gives another byte than there is, the first times that a file is read."""

    def open_input_stream(self, path):
        try:
            self.stumble("open", path)
        except OSError:
            return pa.PythonFile(io.BytesIO(b"x"), "r")
        return self.local.open_input_stream(path)


@pytest.mark.usefixtures("another_node")
def test_what_arrives_damaged_is_fetched_again_and_never_kept(tmp_path, monkeypatch):
    hurry(monkeypatch)
    saved = in_storage(PyFileSystem(Damaging(2, only=("open",))), tmp_path, ["a"])
    folder = saved.shards(0)
    assert (folder / "zero/state/a").read_text() == "zero/state/a"
    assert files_below(folder) == {"zero/state/a"}
    with saved.here("model/") as folder:
        assert files_below(folder) == {"model/config.json"}
    assert not folder.exists()
    saved = in_storage(PyFileSystem(Damaging(10**9, only=("open",))), tmp_path, ["b"])
    with pytest.raises(StorageStumbled, match=r"zero/state/b cannot be .*it arrives damaged"):
        saved.shards(0)
    assert not [file for file in files_below(tmp_path / f"raptide-{os.getuid()}") if "/b" in file]


def test_a_model_may_be_verified_alone(run):
    (run / CHECKPOINTS / "step-00000030/zero.pt").write_bytes(b"weightz")
    assert newest(run, only="model/").step == 30


def test_scratch_is_private(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = scratch_folder("run", "rank-0")
    (folder / "left").write_text("from a killed worker")
    assert not list(scratch_folder("run", "rank-0", empty=True).iterdir())
    folder.parent.parent.chmod(0o777)
    with pytest.raises(CheckpointError, match="can be written by, someone else"):
        scratch_folder("run", "rank-0")


def test_the_newest_and_the_best_stay(tmp_path):
    eces = {10: 17.0, 20: 15.0, 30: 14.0, 40: 14.5, 50: 16.0, 60: 16.1}
    for step, ece in eces.items():
        measured = {"heldout_ece": {"all_chosen": ece}, "heldout_step": step}
        write_checkpoint(
            tmp_path, step, **(measured if step != 30 else measured | {"heldout_step": 20})
        )
    write_checkpoint(tmp_path, 5, heldout_ece=None, heldout_step=0)
    prune(Storage.of(tmp_path / CHECKPOINTS), "step-00000060", 2, 2)
    left = sorted(int(p.name[5:]) for p in (tmp_path / CHECKPOINTS).iterdir())
    assert left == [20, 40, 50, 60], "30 was not evaluated when it was saved"
    prune(Storage.of(tmp_path / CHECKPOINTS), "step-00000060", 1, 0)
    assert [p.name for p in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000060"]


def test_what_waits_for_its_evaluation_stays_until_that_has_ended(tmp_path):
    """Whatever came of it; a checkpoint that nobody evaluates is no longer spared."""
    for step in (10, 20, 30, 40):
        write_checkpoint(
            tmp_path, step, heldout_ece=None, heldout_step=0, awaits_evaluation=step < 40
        )
    (tmp_path / CHECKPOINTS / "step-00000005").mkdir()  # a save that was interrupted
    storage = Storage.of(tmp_path / CHECKPOINTS)
    waiting = awaiting_evaluation(storage, 30)
    assert waiting == ["step-00000010", "step-00000020", "step-00000030"]
    assert awaiting_evaluation(storage, 29) == waiting[:2]
    for spared in (waiting, waiting[1:], waiting[2:], []):
        prune(storage, "step-00000040", 1, 0, spared)
        left = sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir())
        assert left == [*spared, "step-00000040"]
        amend_manifest(storage, "step-00000010", {"awaits_evaluation": False})  # gone: no matter
    assert awaiting_evaluation(storage, 40) == []


def test_nothing_to_resume(tmp_path):
    assert newest(tmp_path) is None
    with pytest.raises(BundleError, match="no model folder, no checkpoint"):
        find_bundle(tmp_path)


def test_another_format_is_refused_and_kept(run):
    folder = write_checkpoint(run, 40, format_version=9)
    with pytest.raises(CheckpointError, match="step-00000040 has checkpoint format 9"):
        newest(run)
    assert folder.exists()


def test_another_stream_and_another_stage_are_refused(run):
    saved = newest(run)
    saved.refuse_other_run(FINGERPRINT, recipe(steps=20))
    with pytest.raises(CheckpointError, match=r"another stream \(seed: 1 -> 2\)"):
        saved.refuse_other_run(FINGERPRINT | {"seed": 2}, recipe())
    with pytest.raises(CheckpointError, match=r"resume with training.zero_stage=2"):
        saved.refuse_other_run(FINGERPRINT, recipe(zero_stage=0))


def stumbling_storage(run, times, *deeds, error=errno.EIO):
    """The run's checkpoints in a file system whose deeds fail so often for each path."""
    handler = Stumbling(times, error, only=deeds)
    return Storage(PyFileSystem(handler), str(run / CHECKPOINTS)), handler


READING = ("info", "list", "open")


def test_a_storage_that_stumbles_is_asked_again(run, monkeypatch):
    hurry(monkeypatch)
    storage, handler = stumbling_storage(run, 1)
    assert newest_checkpoint(storage).step == 30
    assert has_finished_one(storage)
    amend_manifest(storage, "step-00000030", {"heldout_step": 30})
    assert open_checkpoint(storage, "step-00000030").manifest["heldout_step"] == 30
    (run / "zero").mkdir()
    (run / "zero/state.pt").write_bytes(b"state")
    assert send_folder(run / "zero", storage, "step-00000040") == {
        "state.pt": hashlib.sha256(b"state").hexdigest()
    }
    storage.delete("step-00000040")
    prune(storage, "step-00000030", 1, 0)
    assert [name for name in storage.names("", folders=True) if "step" in name] == ["step-00000030"]
    assert {deed for deed, _ in handler.seen} >= {*READING, "create", "write", "delete_dir"}


@pytest.mark.parametrize("deed", READING)
def test_what_the_storage_does_not_give_out_is_not_passed_over(run, monkeypatch, deed, capsys):
    """Steps would be lost for nothing: it may be whole."""
    hurry(monkeypatch)
    storage, _ = stumbling_storage(run, 10**9, deed)
    with pytest.raises(PassingTrouble, match="cannot be reached"):
        newest_checkpoint(storage) if deed != "info" else has_finished_one(storage)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("deed", ["list", "open", "delete_dir"])
def test_nothing_is_deleted_that_cannot_be_read_and_what_is_not_deleted_is_told(
    run, monkeypatch, deed
):
    hurry(monkeypatch)
    storage, _ = stumbling_storage(run, 10**9, deed)
    warnings = []
    with best_effort(warnings.append, "Old checkpoints were not deleted"):
        prune(storage, "step-00000030", 1, 0)
    (sentence,) = warnings
    assert sentence.startswith("Old checkpoints were not deleted: /")
    assert len(list((run / CHECKPOINTS).glob("step-*/manifest.json"))) == 3


def counted(run):
    return counted_names(Storage.of(run / CHECKPOINTS))


def test_what_the_last_attempt_saved_counts_and_what_counted_when_it_began(run):
    """10, 20 and 30 are of an earlier version, which knew no attempts."""
    storage = Storage.of(run / CHECKPOINTS)
    old = counted(run)
    first = begin_attempt(storage, above=7)
    assert first.number == 8
    assert counted(run) == old
    mine = write_checkpoint(run, 40, first)
    (run / CHECKPOINTS / checkpoint_name(45, first)).mkdir()  # not finished
    second = begin_attempt(storage, above=7)
    assert counted(run) == [*old, mine.name], "it was not finished when the second began"
    late = write_checkpoint(run, 50, first)  # the first still lives
    write_checkpoint(run, 20, second)
    taken = write_checkpoint(run, 40, second)
    assert newest(run).name == taken.name == f"step-00000040-{second.name}"
    assert late.name not in counted(run)
    third = begin_attempt(storage, above=7)
    write_checkpoint(run, 45, second)
    assert newest(run).name == taken.name
    assert find_bundle(run).parent.name == taken.name
    write_checkpoint(run, 50, third)
    prune(storage, checkpoint_name(50, third), 1, 0)
    assert [path.name for path in (run / CHECKPOINTS).glob("step-*")] == [
        f"step-00000050-{third.name}"
    ]


def test_an_attempt_that_could_not_say_what_counted_goes_on_from_those_before_it(run):
    storage = Storage.of(run / CHECKPOINTS)
    first = begin_attempt(storage)
    write_checkpoint(run, 40, first)
    second = begin_attempt(storage)
    (run / CHECKPOINTS / "attempts" / second.name).write_text("")
    assert newest(run).step == 40
    write_checkpoint(run, 50, Attempt(second.number, "0"))  # one that began with it, and lost
    assert newest(run).step == 40


def test_a_checkpoint_may_be_named_by_its_step_alone(run):
    """As commands and deployment files name it that were written down before."""
    storage = Storage.of(run / CHECKPOINTS)
    attempt = begin_attempt(storage)
    saved = write_checkpoint(run, 40, attempt)
    write_checkpoint(run, 40, Attempt(0, "0"))
    for name in ("step-00000040", "step-00000040/model"):
        assert find_bundle(run / CHECKPOINTS / name) == saved.resolve() / "model"
    assert find_bundle(run / CHECKPOINTS / "step-00000030").parent.name == "step-00000030"
    with pytest.raises(BundleError):
        find_bundle(run / CHECKPOINTS / "step-00000050")


def test_run_info_that_is_damaged_is_told(run):
    (run / "run.json").write_text("")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        Storage.of_run(run)


@pytest.mark.parametrize("options", ["", "?scheme=http"])
def test_so_it_may_in_a_uri(run, monkeypatch, options):
    storage = Storage.of(run / CHECKPOINTS)
    saved = write_checkpoint(run, 40, begin_attempt(storage))
    monkeypatch.setattr(Storage, "is_local", False)  # as of a bucket
    uri = (run / CHECKPOINTS).as_uri()
    monkeypatch.setattr(Storage, "at", lambda uri, what: Storage.of(uri[7:].partition("?")[0]))
    for name in ("", "/step-00000040", "/step-00000040/model"):
        found = find_bundle_at(f"{uri}{name}{options}")
        assert found == f"{(saved / 'model').as_uri()}{options}"
    with pytest.raises(BundleError):
        find_bundle_at(f"{uri}/step-00000050{options}")
