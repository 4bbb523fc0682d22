"""`python -m serve`: stays until SIGTERM, and finishes what it has begun."""

import os
import signal
import subprocess
import sys
import threading

import httpx
import yaml
from conftest import ROOT

from processes import free_port

SLOW = {"sequences": "MKTAYIAKQR" * 40}
"""400 masked passes: seconds, also for a small model."""

LARGE = {"input": ["MKTAYIAKQR" * 100] * 16, "pooling": "residue"}
"""Its answer is larger than gRPC takes by default, 4 MB."""


def start(config, folder):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "serve", file],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def configuration(port, **arguments):
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "raptide",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": arguments,
            }
        ],
    }


def test_large_answers_pass_and_what_is_being_answered_at_sigterm_is_finished(bundle, tmp_path):
    port = free_port()
    with start(configuration(port, model=str(bundle)), tmp_path) as process:
        url = f"http://127.0.0.1:{port}"
        assert any(line.strip().endswith(url) for line in process.stdout)
        large = httpx.post(f"{url}/v1/embeddings", json=LARGE, timeout=120)
        assert large.status_code == 200
        assert len(large.content) > 2**22
        answers = []
        post = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/scores", json=SLOW, timeout=120))
        )
        post.start()
        post.join(0.7)
        assert not answers, "the request was to take longer"
        process.send_signal(signal.SIGTERM)
        post.join()
        assert answers[0].status_code == 200
        assert process.wait(60) == 0


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    with start({"applications": [{"route": "/"}]}, tmp_path) as process:
        told = process.stdout.read()
        assert process.wait() == 2
    assert told.startswith("error: ")
    assert "import_path" in told
