"""The wheel: what is in it, and the light install of it in an environment that has nothing else."""

import email
import json
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest
from bare_environment import BareEnvironment, requirements_of
from conftest import ROOT
from fake_endpoint import Server

LIGHT = {
    *("numpy", "pyarrow", "pydantic", "pyyaml", "tqdm", "needletail", "isal", "backports.zstd"),
    *("httpx", "httpcore", "h11", "anyio", "idna", "certifi"),
    *("pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"),
}
"""Everything that `pip install raptide` brings, on Python 3.11 to 3.13."""

CLIENT = {
    *("anyio", "certifi", "h11", "httpcore", "httpx", "idna", "numpy", "raptide"),
    "typing_extensions",  # of anyio's
}
"""What a call of the client imports at most, beside the standard library."""


def build(kind, folder, output):
    """What `python -m build` runs of this project, without an environment of its own."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(output)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    )
    return output / done.stdout.splitlines()[-1]


def tracked():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if (ROOT / line).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel out of the sdist out of a clean checkout, and its commit."""
    folder = tmp_path_factory.mktemp("packaging")
    for file in tracked():
        place = folder / "checkout" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, place)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=folder / "checkout", check=True)
    head = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.check_output(head, cwd=folder / "checkout", text=True).strip()
    untracked = folder / "checkout/jobs/benchmarks/development/large.parquet"
    untracked.parent.mkdir()
    untracked.write_text("made here")
    archive = build("sdist", folder / "checkout", folder)
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source, folder), commit


@pytest.fixture(scope="module")
def wheel(built):
    return built[0]


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(packed.read(name))


@pytest.fixture(scope="module")
def light(wheel, metadata, tmp_path_factory):
    environment = BareEnvironment(tmp_path_factory.mktemp("light") / "env")
    environment.install(wheel)
    environment.link(requirements_of(metadata))
    return environment


def test_all_that_is_tracked_is_in_the_wheel_and_nothing_else_has_a_name_at_the_top(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    homes = {"platform/raptide/": "raptide/", "jobs/": "raptide/jobs/", "serve/": "serve/"}
    for file in tracked():
        for home, packed in homes.items():
            if file.startswith(home):
                assert packed + file.removeprefix(home) in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"raptide", "serve"}
    unwanted = ("__pycache__", "tests/", "development/")
    assert not [name for name in names if any(each in name for each in unwanted)]


def test_a_light_install_brings_the_client_and_the_formats_alone(metadata):
    assert requirements_of(metadata) <= LIGHT | {"sniffio"}
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"engine", "train", "serve", "all"} <= extras


def test_the_light_client_imports_what_it_says_and_answers(light):
    server = Server()
    script = """
        import asyncio, json, sys
        from raptide import AsyncClient, Client
        with Client(sys.argv[1]) as client:
            vectors = client.embed(["MKT", "MK"])
        light = {name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names
        with Client(sys.argv[1]) as client:
            residues = client.embed(["MKT"], "residue")
        async def main():
            async with AsyncClient(sys.argv[1]) as client:
                return await client.embed(["MKT", "MK"])
        assert (asyncio.run(main()) == vectors).all()
        print(json.dumps([vectors.tolist(), residues[0].shape, sorted(light)]))
        """
    try:
        done = light.run("python", "-I", "-c", textwrap.dedent(script), server.url)
    finally:
        server.die()
    assert done.returncode == 0, done.stderr
    vectors, shape, imported = json.loads(done.stdout)
    assert vectors == [[3.0] * 4, [2.0] * 4]
    assert shape == [3, 4]
    plain = {name for name in imported if not name.startswith(("_", "sitecustomize"))}
    assert plain <= CLIENT | {"sniffio"}
    assert {"httpx", "numpy"} <= plain


def test_the_light_install_reads_the_data_formats(light, tmp_path):
    script = """
        import sys
        from pathlib import Path
        import raptide
        from raptide import Corpus, CorpusError
        from raptide.data.fasta import read_fasta
        fasta = Path(raptide.__file__).parent / "jobs/benchmarks/tiny/proteins_test.fasta.gz"
        print(sum(len(batch.names) for batch in read_fasta(fasta)))
        try:
            Corpus.open(Path("nothing"))
        except CorpusError as error:
            print(error)
        try:
            raptide.Engine
        except ImportError as error:
            print(error)
        """
    done = light.run("python", "-I", "-c", textwrap.dedent(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count, corpus, engine = done.stdout.splitlines()
    assert int(count) > 10
    assert "nothing" in corpus
    assert "raptide[engine]" in engine


def test_the_command_tells_versions_commands_and_what_is_missing(light, built, tmp_path):
    told = light.run("raptide", "--version", cwd=tmp_path).stdout.splitlines()
    assert told[0] == f"raptide 0.1.0+{built[1]}"
    assert "torch not installed" in told
    shown = light.run("raptide", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in ("build-corpus", "pretrain", "evaluate", "serve"):
        assert f"  {command} " in shown.stdout
    for command, extra in (("pretrain", "train"), ("serve", "serve")):
        done = light.run("raptide", command, "--help", cwd=tmp_path)
        assert done.returncode == 2
        assert "\n" not in done.stderr.strip()
        assert f"pip install 'raptide[{extra}]'" in done.stderr
    done = light.run("raptide", "pretain", cwd=tmp_path)
    assert (done.returncode, "did you mean `pretrain`?" in done.stderr) == (2, True)
