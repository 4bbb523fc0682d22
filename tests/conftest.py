"""One local Ray and a few shared artifacts for the whole session."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: its threads, of two processes on all cores, wait without turning.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import draws
import pytest

from processes import no_orphans
from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.corpus import Corpus

if TYPE_CHECKING:
    from raptide.training.trainer import RunResult

pytest_plugins = [
    "budgets",
    "endpoints",
    "parts",
    "process_logs",
    "suite_times",
]  # of tests/support

ROOT = Path(__file__).resolve().parent.parent

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

# Any will do for the S3 server that tests start; Ray's workers inherit them.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

# Ray's workers, and the processes they start, import works of bulk jobs from there.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT / "tests/support"), os.environ.get("PYTHONPATH")])
)

# Nodes are preempted in tests/chaos alone.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"

# Nobody reads what two of Ray's processes look for all the time: new log files, ten times a second,
# and what each process takes.
os.environ |= {
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}

# Ray's processes for tasks stay for the next test, instead of ending after a second without work.
os.environ |= {"RAY_idle_worker_killing_time_threshold_ms": "30000"}

# A token and a cache of the session's own, so that tests write nothing into the user's home.
_token = Path(tempfile.mkdtemp(prefix="raptide-test-")) / "token"
_token.write_text(secrets.token_hex(32))
os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token)
os.environ["RAPTIDE_CACHE"] = str(_token.parent / "cache")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def pytest_report_header() -> str:
    return f"random draws: RAPTIDE_TEST_SEED={draws.SEED}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture of the test draws."""
    draws.seed_for(item.nodeid)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are no names: gzip's hold the time, and the two processes must call a test the same."""
    return f"{argname} of {len(val)} bytes" if isinstance(val, bytes) else None


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


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, for what workers do together."""
    from lone_worker import group_of_one

    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture
def on_cpu(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's engines are built in this process, as the only rank of a machine without GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture(scope="session")
def watched(
    corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunResult, dict[str, float]]:
    """The run of training/small_runs.py, and what it exported to Prometheus."""
    from exported import series_seen
    from small_runs import as_recipe, make_recipe, run_to_the_end

    folder = tmp_path_factory.mktemp("whole") / "run"
    with series_seen("ray_raptide_train_") as series:
        result = run_to_the_end(as_recipe(make_recipe(corpus, tracked=True)), folder)
    return result, series


@pytest.fixture(scope="session")
def whole(watched: tuple[RunResult, dict[str, float]]) -> RunResult:
    """The run of training/small_runs.py: two workers, ZeRO-2, never interrupted."""
    return watched[0]
