"""One local Ray and a few shared artifacts for the whole session."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from processes import no_orphans
from raptide.data.build import BuildSettings, build_corpus
from raptide.data.corpus import Corpus

pytest_plugins = ["endpoints"]  # fixtures of tests/serve

ROOT = Path(__file__).resolve().parent.parent

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

# A token of the session's own, so that tests write nothing into the user's home.
_token = Path(tempfile.mkdtemp(prefix="raptide-test-")) / "token"
_token.write_text(secrets.token_hex(32))
os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_session() -> Iterator[None]:
    """However the session ends, whatever it started is gone afterwards."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with no_orphans():
        yield


@pytest.fixture(scope="session")
def cluster(nothing_outlives_the_session: None) -> Iterator[None]:
    """A local Ray with room for four training workers."""
    from raptide.cluster import ray_session

    with ray_session(num_cpus=6):
        yield


@pytest.fixture(scope="session")
def proteome() -> Path:
    """A FASTA file of 2,100 real proteins."""
    return Path(str(files("pyhmmer") / "tests/data/seqs/938293.PRJEB85.HG003687.faa"))


@pytest.fixture(scope="session")
def corpus(cluster: None, proteome: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The proteome in blocks of about 32 k residues."""
    output = tmp_path_factory.mktemp("corpus") / "proteome"
    return build_corpus([proteome], output, BuildSettings(block_residues=32_768))
