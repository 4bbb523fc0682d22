"""What a GPU makes of Raptide, in minutes: parity, training steps, peers, engine.

    python tests/gpu/gpu_run.py                       all parts, most telling first
    python tests/gpu/gpu_run.py --parts parity,steps
    python tests/gpu/gpu_run.py --device cpu          a dry run with tiny shapes

Needs torch 2.11 or newer, numpy, pydantic, pyyaml and safetensors; neither Ray nor pyarrow nor
DeepSpeed, and transformers for the peers alone. Each part is a process with a time limit, which
writes what it finds line by line; after each line `--json` and the Markdown file beside it are
whole, so that nothing is lost to a part that hangs or takes the GPU's context with it.

Exit code 1 if something was wrong or failed; a goal of speed that was missed is reported, no more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

LIMITS_S = {"parity": 120, "steps": 160, "peers": 100, "passes": 90}
"""Seconds of each part, in their order; under eight minutes together."""

DRY_LIMIT_S = 1800

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE.parents[1] / "platform"), str(HERE.parent / "support")]


def main() -> int:
    args = parse()
    sys.path[1:1] = PATHS
    if args.here:
        for part in args.parts:
            print(json.dumps({"begins": part}), flush=True)
            importlib.import_module(part).main(args.device, LIMITS_S[part])
        return 0
    reason = why_not(args.device)
    if reason is not None:
        print(f"Skipped: {reason}.")
        return 0
    report = Report(args.json)
    # A dry run is about typos: its parts share a process, which has time.
    for parts in [[part] for part in args.parts] if args.device == "cuda" else [args.parts]:
        run_parts(parts, args.device, report)
    print(report.markdown())
    return int(any(row["verdict"] == "WRONG" for row in report.rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=named_parts, default=list(LIMITS_S), metavar="P,P")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def named_parts(text: str) -> list[str]:
    asked = text.split(",")
    if not set(asked) <= set(LIMITS_S):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(LIMITS_S)}, but {text} was given")
    return [part for part in LIMITS_S if part in asked]


def why_not(device: str) -> str | None:
    """Why nothing can be run here."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        return f"torch 2.11 or newer is needed, and this is {torch.__version__}"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU; --device cpu tries the same with tiny shapes"
    return None


class Report:
    """Rows of all parts, on disk after each."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._began = time.time()
        self.facts: dict[str, object] = {"command": " ".join(["python", *sys.argv])}
        self.rows: list[dict[str, object]] = []

    def add(self, part: str, line: dict[str, object]) -> None:
        """A line that a part has written, or what became of the part."""
        if "facts" in line:
            self.facts |= dict(line["facts"])  # type: ignore[call-overload]
        else:
            self.rows.append({"part": part, "verdict": "", "note": ""} | line)
            shown = self.rows[-1]
            print(*(shown.get(key, "") for key in COLUMNS), sep="  ", flush=True)
        self.facts["seconds"] = round(time.time() - self._began, 1)
        text = json.dumps({"facts": self.facts, "rows": self.rows}, indent=1)
        replace(self._file, text)
        replace(self._file.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        lines = [f"{name}: {value}  " for name, value in self.facts.items()]
        lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in self.rows:
            lines.append(f"| {' | '.join(str(row.get(key, '')) for key in COLUMNS)} |")
        return "\n".join(lines) + "\n"


COLUMNS = ("part", "case", "what", "value", "unit", "goal", "verdict", "note")


def replace(file: Path, text: str) -> None:
    """Never half a file."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text)
    beside.replace(file)


def run_parts(parts: list[str], device: str, report: Report) -> None:
    """Parts in a process of their own, which is ended when their time is over."""
    command = [sys.executable, __file__, "--here", "--parts", ",".join(parts), "--device", device]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    limit_s = sum(LIMITS_S[part] for part in parts) if device == "cuda" else DRY_LIMIT_S
    late = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    part, said = parts[0], list[str]()
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            said.append(line.rstrip())
        elif "begins" in (row := json.loads(line)):
            part = row["begins"]
        else:
            report.add(part, row)
    process.wait()
    late.cancel()
    if process.returncode:
        print("\n".join(said[-40:]), file=sys.stderr)
        killed = process.returncode == -signal.SIGKILL
        what = f"ended after {limit_s} s" if killed else "failed"
        report.add(part, {"case": what, "verdict": "WRONG", "note": " ".join(said[-1:])[:200]})


if __name__ == "__main__":
    sys.exit(main())
