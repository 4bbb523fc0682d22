"""The wheel's whole way, with times: built, installed light and whole, the demo without a checkout.

    python tests/packaging/wheel_journey.py
    python tests/packaging/wheel_journey.py --quick
    python tests/packaging/wheel_journey.py --python python3.12 --json journey.json

Builds sdist and wheel with `python -m build`, installs the wheel into an empty environment, says
how large that is, how long the client takes to import and what it imports. Then installs `[all]`
into another, runs `raptide demo` in an empty folder, and calls the endpoint that `raptide serve`
makes of it with the light environment's client, which reads the demo's corpus too. --quick leaves
out what takes `[all]`. Packages come from wherever pip takes them, in constraints.txt's versions.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "jobs"), str(ROOT / "tests/benchmarks")]

from by_hand import Report, parse, run_script, script_parser  # noqa: E402

from processes import free_port  # noqa: E402

PACKAGES = ("raptide",)
STAGES = ["light", "all"]
IMPORTED = """
import json, sys, time
before = set(sys.modules)
started = time.perf_counter()
from raptide import Client
seconds = time.perf_counter() - started
tops = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps([round(seconds, 3), sorted(tops)]))
"""
CALLED = """
import sys
from raptide import Client, Corpus
corpus = Corpus.open(sys.argv[2])
with Client(sys.argv[1]) as client:
    vectors = client.embed(["MKTAYIAKQR", "GSHMLEDPVA"])
    scores = client.score_sequences(["MKTAYIAKQR"])
    print(vectors.shape, scores, client.weights, corpus.digest[:16])
"""


class Environment:
    """A virtual environment, and what is run in it with nothing of the caller's."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        subprocess.run([python, "-m", "venv", str(folder)], check=True)

    def pip(self, *arguments: str) -> None:
        limits = ["--constraint", str(ROOT / "constraints.txt")]
        self.run("python", "-m", "pip", "install", "--quiet", *limits, *arguments, cwd=ROOT)

    def run(self, name: str, *arguments: object, cwd: Path) -> str:
        command = [str(self.folder / "bin" / name), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=_plain(), capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr)[-3000:]
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said}")
        return done.stdout

    @property
    def megabytes(self) -> float:
        files = (path for path in self.folder.glob("lib/**/*") if path.is_file())
        return sum(path.stat().st_size for path in files if not path.is_symlink()) / 1e6


def _plain() -> dict[str, str]:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--python", default=sys.executable, help="for the environments")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="how far it goes"
    )
    args = parse(parser, {"stages": STAGES[:1]})
    with (
        Report("wheel_journey", args, PACKAGES, print_report) as report,
        tempfile.TemporaryDirectory() as temporary,
    ):
        folder = Path(temporary)
        with report.part("build"):
            wheel = build(folder, args.python, report)
        with report.part("light"):
            light = Environment(folder / "light", args.python)
            install(light, str(wheel), report)
        if "all" in args.stages:
            with report.part("all"):
                whole = Environment(folder / "all", args.python)
                timed(report, "install_all_s", whole.pip, f"{wheel}[all]")
                report["all_megabytes"] = round(whole.megabytes)
            with report.part("demo"):
                here = folder / "here"
                here.mkdir()
                timed(report, "demo_s", whole.run, "raptide", "demo", cwd=here)
                report["demo"] = json.loads((here / "runs/demo/summary.json").read_text())
            with report.part("serve"):
                report["called"] = serve_and_call(whole, light, here)
    return 0


def timed(report: Any, name: str, work: Any, *arguments: Any, **options: Any) -> Any:
    started = time.perf_counter()
    result = work(*arguments, **options)
    report[name] = round(time.perf_counter() - started, 1)
    return result


def build(folder: Path, python: str, report: Any) -> Path:
    tools = Environment(folder / "tools", python)
    tools.pip("build")
    timed(report, "build_s", tools.run, "python", "-m", "build", "--outdir", folder, ROOT, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    report |= {"wheel_bytes": wheel.stat().st_size, "sdist_bytes": sdist.stat().st_size}
    return wheel


def install(light: Environment, wheel: str, report: Any) -> None:
    before = light.megabytes
    timed(report, "install_light_s", light.pip, wheel)
    report["light_megabytes"] = round(light.megabytes - before)
    here = light.folder
    runs = [json.loads(light.run("python", "-I", "-c", IMPORTED, cwd=here)) for _ in range(5)]
    report["import_s"] = min(seconds for seconds, _ in runs)
    report["imports"] = runs[0][1]
    report["versions"] = light.run("raptide", "--version", cwd=here).splitlines()
    listed = light.run("python", "-m", "pip", "list", "--format", "json", cwd=here)
    report["light_packages"] = sorted(each["name"] for each in json.loads(listed))


def serve_and_call(whole: Environment, light: Environment, here: Path) -> str:
    """What the light environment's client says of an endpoint of the whole one's."""
    port = free_port()
    application = {"name": "raptide", "route_prefix": "/", "import_path": "serve.app:build"}
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{**application, "args": {"model": str(here / "runs/demo")}}],
    }
    (here / "serve.yaml").write_text(json.dumps(config))
    command = [str(whole.folder / "bin/raptide"), "serve", str(here / "serve.yaml")]
    server = subprocess.Popen(command, cwd=here, env=_plain() | {"RAY_ADDRESS": "local"})
    try:
        url = f"http://127.0.0.1:{port}"
        return light.run("python", "-I", "-c", CALLED, url, here / "corpora/demo", cwd=here).strip()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)


def print_report(report: dict[str, Any]) -> None:
    for name, value in report.items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    run_script(main)
