"""What is read once, at the start of things, is read in spite of a file system that stumbles."""

import errno
import hashlib
from pathlib import Path

import pytest
import torch
from draws import random_weights
from storages import bucket
from stumbles import hurry, stumbling

from raptide.config import Settings, load_settings
from raptide.errors import BundleError, ConfigError, InputError, PassingTrouble, RaptideError
from raptide.model.formats import tensor_files
from raptide.model.formats.detect import read_weights, write_weights
from raptide.patience import TRIES, patiently, trouble
from raptide.storage import Storage


class Few(Settings):
    steps: int


@pytest.fixture
def files(tmp_path):
    """A settings file, a bundle, and a file of PyTorch's."""
    (tmp_path / "few.yaml").write_text("steps: 3")
    weights = random_weights(family="esm2", layers=1, width=16, heads=2)
    write_weights(tmp_path / "bundle", weights)
    write_weights(tmp_path / "esm2.pt", weights)
    return tmp_path


def stumble(monkeypatch, number, times):
    """In every way in which they are read."""
    monkeypatch.setattr(Path, "read_text", stumbling(Path.read_text, number, times))
    read = tensor_files.load_file
    monkeypatch.setattr(tensor_files, "load_file", stumbling(read, number, times))
    monkeypatch.setattr(torch, "load", stumbling(torch.load, number, times))
    monkeypatch.setattr(hashlib, "file_digest", stumbling(hashlib.file_digest, number, times))


READS = [
    lambda folder: load_settings(Few, folder / "few.yaml").steps,
    lambda folder: read_weights(folder / "bundle").settings.width,
    lambda folder: read_weights(folder / "esm2.pt").settings.width,
    lambda folder: tensor_files.digest_weights(folder / "bundle"),
]


@pytest.mark.parametrize("read", READS)
def test_settings_and_weights_are_read_again(files, monkeypatch, read):
    hurry(monkeypatch)
    expected = read(files)
    stumble(monkeypatch, errno.ESTALE, TRIES - 1)
    assert read(files) == expected


@pytest.mark.parametrize("read", READS[1:])
def test_weights_that_cannot_be_read_are_not_damaged(files, monkeypatch, read):
    pauses = hurry(monkeypatch)
    stumble(monkeypatch, errno.EIO, 10**6)
    with pytest.raises(PassingTrouble, match=r"cannot be read .Input/output error") as caught:
        read(files)
    assert not isinstance(caught.value, BundleError)
    pauses.clear()
    monkeypatch.undo()
    pauses = hurry(monkeypatch)
    stumble(monkeypatch, errno.EACCES, 10**6)
    with pytest.raises(RaptideError, match="Permission denied") as caught:
        read(files)
    assert not isinstance(caught.value, (PassingTrouble, InputError))
    assert pauses == []


def test_settings_that_are_not_there_are_told_at_once(tmp_path, monkeypatch):
    pauses = hurry(monkeypatch)
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(Few, tmp_path / "none.yaml")
    assert pauses == []


def test_a_bucket_that_is_not_there_is_final(monkeypatch):
    pauses = hurry(monkeypatch)
    with bucket("here") as uri:
        storage = Storage.at(uri.format("x").replace("s3://here/", "s3://elsewhere/"))
        for act in (
            lambda: storage.write("a", lambda file: file.write(b"x")),
            lambda: storage.filesystem.create_dir(storage.path, recursive=True),
        ):
            with pytest.raises((RaptideError, OSError)) as told:
                patiently(act)
            assert not isinstance(told.value, PassingTrouble)
    assert not pauses


@pytest.mark.parametrize(
    ("said", "final"),
    [
        ("AWS Error ACCESS_DENIED during PutObject operation: No response body.", True),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during HeadObject operation: x", True),
        ("google::cloud::Status(PERMISSION_DENIED: Permission denied error=x)", True),
        ("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.", False),
        ("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28", False),
    ],
)
def test_keys_that_open_nothing_are_final(said, final):
    assert isinstance(trouble(OSError(f"When testing: {said}"), "x"), PassingTrouble) != final
