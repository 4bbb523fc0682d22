"""What the package promises: its public names, errors that travel, layers that hold."""

import pickle
import subprocess
import sys

import pytest
from conftest import ROOT

import raptide
from raptide import errors


def test_public_names():
    assert sorted(raptide.__all__) == [
        "AsyncClient",
        "BundleError",
        "CheckpointError",
        "Client",
        "ConfigError",
        "Corpus",
        "CorpusError",
        "Engine",
        "FastaError",
        "InputError",
        "RaptideError",
        "SequenceError",
        "ServiceError",
        "StreamStalled",
    ]
    assert all(getattr(raptide, name) is not None for name in raptide.__all__)


def test_every_error_survives_pickling_and_is_found_behind_a_cause():
    for cls in (errors.FastaError, errors.StreamStalled):
        error = pickle.loads(pickle.dumps(cls("a sentence")))  # noqa: S301
        assert isinstance(error, cls)
        assert str(error) == "a sentence"
        outer = RuntimeError("outer")
        outer.__cause__ = error
        found = errors.find_raptide_error(outer)
        assert (type(found), str(found)) == (cls, "a sentence")
    assert errors.find_raptide_error(RuntimeError("other")) is None


def test_layers_hold():
    subprocess.run([f"{sys.prefix}/bin/lint-imports"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("raptide.data.streaming.stream", {"torch"}),
        ("raptide.data.streaming.letters", {"torch"}),
        ("raptide.evaluation.counting", {"torch"}),
        ("raptide.client", {"torch", "ray", "fastapi"}),
        ("raptide.load.requests", {"torch", "ray"}),
        ("serve.gateway.deployment", {"torch"}),
    ],
)
def test_a_layer_loads_no_heavy_library_it_does_not_need(module, unneeded):
    code = f"import sys, {module}; sys.exit(bool({unneeded} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_platform_stays_a_source_root_and_jobs_shadow_nothing():
    assert not (ROOT / "platform/__init__.py").exists()
    names = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted(ROOT.glob("platform/**/*.py")), ids=lambda p: p.stem)
def test_no_module_grows_past_a_screenful_of_screens(path):
    assert len(path.read_text().splitlines()) < 400
