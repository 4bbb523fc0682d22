"""The load generator against a local endpoint whose speed and failures are known."""

import asyncio
import json
import threading

import numpy as np
import pytest
from aiohttp import web
from in_process import job_in_process

from raptide.alphabet import encode_residues
from raptide.data.building.synthetic import random_proteins
from raptide.load.levels import Level, LoadGenerator
from raptide.load.report import summarise
from raptide.load.requests import embedding_requests, read_proteins, score_requests

SERVICE_S = 0.02


class Endpoint:
    """Answers one request at a time, each after SERVICE_S; `refuse` names a status instead."""

    def __init__(self):
        self.bodies, self.headers = [], []
        self.refuse = None
        self.key = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)
        self._thread.start()
        self._started.wait()

    async def _serve(self):
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._turn = asyncio.Lock()
        app = web.Application()
        app.add_routes([web.get("/v1/models", self.models), web.post("/v1/{call}", self.answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        await self._over.wait()
        await runner.cleanup()

    def stop(self):
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def models(self, request):
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            error = {"type": "unauthorized", "message": "A key is needed.", "param": None}
            return web.json_response({"error": error}, status=401)
        return web.json_response({"data": [{"id": "known", "max_residues": 400}]})

    async def answer(self, request):
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        if self.refuse is not None:
            return web.json_response({}, status=self.refuse, headers={"Retry-After": "1"})
        async with self._turn:
            await asyncio.sleep(SERVICE_S)
        return web.json_response({"data": []})


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()


def load(endpoint, level, duration_s=1.0, each=1):
    requests = embedding_requests(["MKTAYIAKQR"], each, "base64")
    generator = LoadGenerator(endpoint.url, requests, None, 30.0)
    return summarise(generator.run(level, duration_s=duration_s, warmup_s=0.2))


def test_a_closed_loop_finds_the_most_and_its_queue(endpoint):
    one = load(endpoint, Level(clients=1))
    ten = load(endpoint, Level(clients=10))
    assert one["errors"] == ten["errors"] == {}
    for level in (one, ten):
        assert 0.4 / SERVICE_S < level["requests_per_s"] < 1.05 / SERVICE_S
        assert level["residues_per_s"] == pytest.approx(10 * level["requests_per_s"], rel=0.01)
    assert one["latency_ms"]["p50"] >= 1e3 * SERVICE_S
    assert ten["latency_ms"]["p50"] > 5 * one["latency_ms"]["p50"], "nine are ahead of each"


def test_an_open_loop_counts_the_wait_from_when_a_request_was_due(endpoint):
    calm = load(endpoint, Level(rate=0.2 / SERVICE_S), duration_s=2.0)
    flood = load(endpoint, Level(rate=4 / SERVICE_S))
    assert calm["requests"] == pytest.approx(0.2 / SERVICE_S * 2, rel=0.7)
    assert calm["latency_ms"]["p50"] < 10e3 * SERVICE_S
    # Four times what can be answered comes: the last of 1.2 s has waited for about 3.6 s.
    assert flood["requests"] > 2.5 * flood["requests_per_s"]
    assert flood["latency_ms"]["p99"] > 2000


def test_errors_are_counted_by_status_and_do_not_flatter(endpoint):
    endpoint.refuse = 429
    level = load(endpoint, Level(clients=4))
    assert set(level["errors"]) == {"429"}
    assert level["errors"]["429"] == level["requests"] <= 8, "Retry-After is honoured"
    assert level["requests_per_s"] == level["residues_per_s"] == 0
    assert level["latency_ms"]["p50"] is None


def test_an_endpoint_that_is_not_there_is_an_error_of_every_request():
    requests = embedding_requests(["MK"], 1, "base64")
    generator = LoadGenerator("http://127.0.0.1:1", requests, None, 30.0)
    level = summarise(generator.run(Level(clients=2), duration_s=0.5, warmup_s=0.0))
    assert set(level["errors"]) == {"connection"}
    assert level["errors"]["connection"] >= 2


def test_requests_hold_the_proteins_in_turn():
    requests = embedding_requests(["M", "MK", "MKT"], 2, "float", pooling="bos")
    first, second = next(requests), next(requests)
    assert first.body == {"input": ["M", "MK"], "encoding_format": "float", "pooling": "bos"}
    assert (second.body["input"], second.residues) == (["MKT", "M"], 4)
    arrow = next(embedding_requests(["M"], 1, "arrow"))
    assert arrow.accept == "application/vnd.apache.arrow.stream"
    assert next(score_requests(["MK"], 1)).body == {"sequences": ["MK"], "method": "one-pass"}


def test_proteins_are_random_with_natural_lengths_or_those_of_a_file(proteome):
    proteins = random_proteins(3000, longest=1022)
    lengths = np.array([len(encode_residues(each)) for each in proteins])
    assert lengths.max() <= 1022
    assert 200 < np.median(lengths) < 280
    assert proteins == random_proteins(3000, longest=1022)
    real = read_proteins(proteome, 50, 300)
    assert len(real) == 50
    assert max(map(len, real)) <= 300


def run_job(*arguments, cwd, **env):
    return job_in_process("load_test.py", *arguments, cwd=cwd, env=env)


def test_the_job_prints_a_table_writes_figures_and_draws(endpoint, proteome, tmp_path):
    endpoint.key = "secret"
    done = run_job(
        *(endpoint.url, "--clients", 1, 8, "--rate", 10, "--duration", 1, "--warmup", 0.1),
        *("--json", "load.json", "--input", proteome, "--proteins", 100),
        cwd=tmp_path,
        RAPTIDE_API_KEY="secret",
    )
    assert done.returncode == 0, done.stderr
    for text in ("known", "1 client ", "8 clients", "10/s", "p99 ms", "Most: ", "load.png"):
        assert text in done.stdout
    report = json.loads((tmp_path / "load.json").read_text())
    assert [level["load"] for level in report["levels"]] == ["1 client", "8 clients", "10/s"]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer secret"}
    assert max(len(body["input"][0]) for body in endpoint.bodies) <= 400, "the model's limit"
    assert "secret" not in done.stdout + done.stderr + json.dumps(report)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "refuses the API key (A key is needed.)"),
        (("--clients", 0), 2, "--clients must be above 0"),
        (("--rate", -1), 2, "--rate must be above 0"),
        (("--input", "none.fasta"), 2, "none.fasta"),
        (("--model", "other"), 2, "serves 'known', but --model other"),
    ],
)
def test_a_mistake_is_one_line(endpoint, tmp_path, arguments, code, message):
    endpoint.key = "secret"
    env = {"RAPTIDE_API_KEY": "secret"} if arguments else {}
    done = run_job(endpoint.url, *arguments, cwd=tmp_path, **env)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not endpoint.bodies


def test_no_endpoint_is_one_line(tmp_path):
    done = run_job("http://127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: http://127.0.0.1:1 cannot be reached")
    assert done.stderr.count("\n") == 1
