"""A model that is served stays, whatever becomes of the run it came from."""

import asyncio
import hashlib
import json
import os
import shutil

import pyarrow.fs
import pytest
import storages
from endpoints import make_bundle
from safetensors.torch import load_file

from raptide.errors import BundleError, ConfigError
from raptide.kept import CACHE
from raptide.model.formats.detect import read_weights, write_weights
from raptide.model.formats.tensor_files import digest_weights
from serve.app import _kept
from serve.models import SERVED, open_model
from serve.replica.deployment import Replica
from serve.settings import ModelSettings


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Go to a node, each with a shelf of its own."""

    def go(name):
        monkeypatch.setenv(CACHE, str(tmp_path / name))

    go("first")
    return go


@pytest.fixture
def run(tmp_path, bundle):
    """A run with one checkpoint of the endpoint's bundle."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints/step-00000005"
    shutil.copytree(bundle, checkpoint / "model")
    (folder / "run.json").write_text('{"checkpoints": null}')
    files = {
        f"model/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (checkpoint / "model").iterdir()
    }
    manifest = {"format_version": 1, "step": 5, "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


def keep(path, staging=None):
    return _kept(ModelSettings(name="m", path=str(path)), staging)


def assert_serves(served, bundle):
    described = asyncio.run(Replica(served).describe())
    assert described["weights"] == digest_weights(bundle)[:16]
    assert described["verified"]


def test_a_replica_comes_back_after_its_checkpoint_was_pruned_here_and_on_a_new_node(
    run, bundle, node
):
    served = keep(run)
    kept = run / SERVED / served.digest / "model.safetensors"
    assert os.path.samefile(kept, run / "checkpoints/step-00000005/model/model.safetensors")
    shutil.rmtree(run / "checkpoints")
    assert_serves(served, bundle)
    node("second")
    assert_serves(served, bundle)
    shutil.rmtree(run)
    assert_serves(served, bundle)
    node("third")
    with pytest.raises(BundleError, match=r"model 'm' are not on this node, .*`staging` at a"):
        Replica(served)


def test_deployed_twice_it_is_the_same_and_staged_where_it_is_said(run, bundle, node, tmp_path):
    served = keep(run, staging=str(tmp_path / "shared"))
    assert keep(run, staging=str(tmp_path / "shared")) == served
    assert served.path == str(tmp_path / "shared" / served.digest)
    shutil.rmtree(run)
    node("second")
    assert_serves(served, bundle)


def test_a_folder_that_is_written_anew_does_not_change_what_is_served(bundle, node, tmp_path):
    shutil.copytree(bundle, tmp_path / "model")
    served = keep(tmp_path / "model")
    make_bundle(tmp_path / "model", seed=7)
    assert_serves(served, bundle)
    node("second")
    with pytest.raises(BundleError, match="does not hold them any more"):
        open_model(served)


def test_a_file_of_fair_esm_goes_with_its_contact_head(bundle, node, tmp_path):
    file = tmp_path / "esm2_tiny.pt"
    write_weights(file, read_weights(bundle))
    (tmp_path / "other.pt").write_bytes(b"no part of it")
    served = keep(file)
    node("second")
    opened = open_model(served)
    assert opened.name == file.name
    assert sorted(each.name for each in opened.parent.iterdir()) == sorted(
        [file.name, "esm2_tiny-contact-regression.pt"]
    )
    assert read_weights(opened).contact_head is not None


def test_a_node_without_room_says_so_at_the_deploy(run, node, tmp_path):
    with storages.small_disk(tmp_path / "disk", 1) as disk:
        node("disk")
        (disk / "filler").write_bytes(bytes(990_000))
        with pytest.raises(ConfigError, match=r"kept in .*disk/models \(No space left.*RAPTIDE_C"):
            keep(run)


@pytest.mark.parametrize("what", ["model", "checkpoint", "run"])
def test_a_model_is_served_from_a_bucket_and_staged_in_one(run, bundle, node, tmp_path, what):
    with storages.bucket("models") as uri:
        given, staging = uri.format("given"), uri.format("staged")
        source = {"model": "step-00000005/model", "checkpoint": "step-00000005", "run": ""}[what]
        storage, path = pyarrow.fs.FileSystem.from_uri(given)
        local = pyarrow.fs.LocalFileSystem()
        pyarrow.fs.copy_files(str(run / "checkpoints" / source), path, local, storage)
        served = keep(given, staging)
        storage.delete_dir(path)
        node("second")
        opened = open_model(served)
        assert load_file(opened / "model.safetensors").keys()
        assert_serves(served, bundle)
