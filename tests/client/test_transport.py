"""The client against a local server that refuses, breaks off, forgets and dies."""

import json
import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pytest

from raptide import Client, ConfigError, SequenceError, ServiceError

WIDTH = 4
ARROW = "application/vnd.apache.arrow.stream"


class Handler(BaseHTTPRequestHandler):
    """Embeds a sequence as its length, in every place; `mishaps` come first, one a request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200, json.dumps({"data": [{"id": "m", "width": WIDTH}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((body, dict(self.headers)))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            mishap = server.mishaps.pop(0) if server.mishaps else None
        try:
            time.sleep(server.delay_s)
            if mishap is None:
                self.embed(body["input"], self.headers["Accept"] == ARROW)
            else:
                mishap(self)
        finally:
            with server.lock:
                server.running -= 1

    def embed(self, sequences, as_arrow, rows=None):
        if as_arrow:
            return self.answer(200, arrow(sequences[:rows]), {"Content-Type": ARROW})
        data = [
            {"index": i, "embedding": [float(len(s))] * WIDTH, "shape": [WIDTH]}
            for i, s in enumerate(sequences)
        ]
        return self.answer(200, json.dumps({"data": data[::-1]}).encode())

    def answer(self, status, content, headers=None, announced=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def arrow(sequences):
    sink = pa.BufferOutputStream()
    schema = pa.schema(
        {"index": pa.int64(), "values": pa.list_(pa.float32()), "shape": pa.list_(pa.int64())}
    )
    with pa.ipc.new_stream(sink, schema) as writer:
        for index, sequence in enumerate(sequences):
            values, shape = [float(len(sequence))] * len(sequence) * WIDTH, [len(sequence), WIDTH]
            writer.write_batch(pa.record_batch([[index], [values], [shape]], schema=schema))
    return sink.getvalue().to_pybytes()


def refuse(status, type="invalid_request", message="No.", param=None, **headers):
    content = json.dumps({"error": {"type": type, "message": message, "param": param}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.answer(status, content, named)


def say(status, text):
    return lambda handler: handler.answer(status, text)


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler):
    handler.answer(200, b'{"data": [', announced=500)
    hang_up(handler)


def lose_a_row(handler):
    handler.embed(handler.server.requests[-1][0]["input"], True, rows=-1)


def cut_the_stream(handler):
    stream = arrow(handler.server.requests[-1][0]["input"])
    handler.answer(200, stream[: len(stream) // 2], {"Content-Type": ARROW})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.mishaps, self.requests = [], []
        self.running = self.most_running = 0
        self.delay_s = 0.0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that leave are part of the tests

    def die(self):
        self.shutdown()
        self.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.die()


def embed(server, sequences, pooling="mean", **options):
    with Client(server.url, **options) as client:
        return client.embed(sequences, pooling)


@pytest.mark.parametrize(
    "mishap",
    [
        refuse(429, "overloaded"),
        say(502, b"Bad Gateway"),
        refuse(503),
        say(504, b"Gateway Timeout"),
        say(500, b"Internal Server Error"),
        hang_up,
        break_off,
    ],
    ids=["429", "502", "503", "504", "a proxy's 500", "hang-up", "half an answer"],
)
def test_what_passes_is_tried_again(server, mishap):
    server.mishaps = [mishap, mishap]
    np.testing.assert_array_equal(embed(server, ["MKT"]), np.full((1, WIDTH), 3, np.float32))
    assert len(server.requests) == 3


@pytest.mark.parametrize("mishap", [lose_a_row, cut_the_stream])
def test_an_arrow_stream_that_ends_early_is_asked_for_again(server, mishap):
    server.mishaps = [mishap]
    first, second = embed(server, ["MKT", "M" * 5], "residue")
    assert (first.shape, second.shape) == ((3, WIDTH), (5, WIDTH))
    assert (first == 3).all()
    assert (second == 5).all()
    assert first.dtype == np.float32
    assert first.flags.writeable
    assert len(server.requests) == 2


@pytest.mark.parametrize("when", ["1", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_retry_after_is_waited_for(server, when):
    server.mishaps = [refuse(429, Retry_After=when if isinstance(when, str) else when())]
    started = time.monotonic()
    embed(server, ["MKT"])
    assert time.monotonic() - started >= 0.99


def test_a_wait_beyond_the_window_is_not_begun(server):
    server.mishaps = [refuse(429, message="The queue is full.", Retry_After="3600")]
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"429: The queue is full; given up after 0 s"):
        embed(server, ["MKT"])
    assert time.monotonic() - started < 30


def test_a_restart_of_the_endpoint_is_outlasted(server):
    with Client(server.url) as client:
        client.embed(["MKT"])
        port = server.server_port
        server.die()
        reborn = []
        timer = threading.Timer(1.5, lambda: reborn.append(Server(port)))
        timer.start()
        try:
            assert client.embed(["MK"])[0, 0] == 2
        finally:
            timer.join()
            reborn[0].die()


def test_what_stays_away_is_one_sentence_after_the_window():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with Client(url, retry_s=1) as client, pytest.raises(ServiceError) as caught:
            client.models()
        assert 0.2 < time.monotonic() - started < 5
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "given up after" in str(caught.value)


def test_without_a_window_nothing_is_tried_again(server):
    server.mishaps = [refuse(503, message="Starting.")]
    with pytest.raises(ServiceError, match=r"503: Starting\.$"):
        embed(server, ["MKT"], retry_s=0)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("mishap", "error", "message"),
    [
        (refuse(401, "unauthorized", "Unknown key."), ConfigError, "API key .Unknown key"),
        (refuse(403, "forbidden", "Revoked."), ConfigError, "RAPTIDE_API_KEY"),
        (refuse(404, message="No model 'x'.", param="model"), ConfigError, "^No model 'x'"),
        (refuse(404, message="Not Found"), ConfigError, "/v1/embeddings answered 404: Not Found"),
        (refuse(422, message="Sequence 0: long.", param="input"), SequenceError, "Sequence 0"),
        (refuse(422, message="No layer 9.", param="layers"), ConfigError, "^No layer 9"),
        (refuse(500, "internal", "Failed inside."), ServiceError, "500: Failed inside"),
        (refuse(504, "deadline", "Late."), ServiceError, "504: Late"),
        (say(200, b"<html>hello</html>"), ServiceError, "is it a Raptide endpoint"),
        (say(302, b""), ServiceError, "302"),
    ],
)
def test_a_final_answer_is_one_error_and_asked_once(server, mishap, error, message):
    server.mishaps = [mishap]
    with pytest.raises(error, match=message) as caught:
        embed(server, ["MKT"])
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_silent_endpoint_is_given_up_at_the_deadline(server, monkeypatch):
    monkeypatch.setattr("raptide.client.transport.GRACE_S", 0.1)
    server.delay_s = 1.0
    with pytest.raises(ServiceError, match=r"did not answer within 0\.2 s"):
        embed(server, ["MKT"], timeout_s=0.2)
    assert server.requests[0][1]["X-Raptide-Timeout-S"] == "0.2"


def test_an_index_counts_from_the_start_of_the_call(server):
    server.mishaps = [
        None,
        None,
        refuse(422, message="Sequence 1: too long.", param="input"),
    ]
    with pytest.raises(SequenceError, match=r"^Sequence 5: too long"):
        embed(server, ["MKT"] * 6, chunk_sequences=2, parallel=1)


def test_a_mistake_in_a_list_is_found_before_anything_is_sent(server):
    for bad, message in ((["MK", "M1"], "Sequence 1: .*'1'"), (["MK", 3], "Sequence 1: .* int")):
        with pytest.raises(SequenceError, match=message):
            embed(server, bad, chunk_sequences=1)
    with pytest.raises(SequenceError, match="use \\[it\\]"):
        embed(server, "MKT")
    assert not server.requests


def test_long_lists_go_in_bounded_chunks_in_parallel_and_come_back_in_order(server):
    server.delay_s = 0.02
    sequences = ["M" * (1 + i % 700) for i in range(500)]
    vectors = embed(server, sequences, parallel=4, chunk_sequences=50)
    assert vectors[:, 0].tolist() == [len(each) for each in sequences]
    sizes = [[len(s) + 2 for s in body["input"]] for body, _ in server.requests]
    assert max(map(len, sizes)) <= 50
    assert max(map(sum, sizes)) <= 4_096
    assert 1 < server.most_running <= 4


def test_residues_of_many_layers_are_asked_for_less_at_a_time_and_by_arrow(server):
    """So that no answer is larger than one of one layer, and none in JSON is refused."""
    with Client(server.url) as client:
        client.embed(["M" * 98] * 40, "residue", layers=range(10))
        client.embed(["M" * 98] * 40, layers=range(10))
    residues = [b for b, _ in server.requests if b["pooling"] == "residue"]
    assert len(residues) == 10
    assert max(sum(len(s) + 2 for s in body["input"]) for body in residues) <= 409
    assert len(server.requests) == 11
    assert {headers["Accept"] for _, headers in server.requests} == {ARROW}


def test_a_generator_is_read_a_bounded_way_ahead(server):
    read = 0

    def generate():
        nonlocal read
        while True:
            read += 1
            yield "M" * (1 + read % 9)

    with Client(server.url, parallel=2, chunk_sequences=10) as client:
        results = client.embed(generate())
        for index in range(1, 101):
            vector = next(results)
            assert vector.shape == (WIDTH,)
            assert vector[0] == 1 + index % 9
            assert read <= index + 10 * (2 * 2 + 1)
        results.close()
        time.sleep(0.3)  # for those on their way
        sent = len(server.requests)
        time.sleep(0.3)
    assert len(server.requests) == sent, "an abandoned generator goes on sending"


def test_after_an_error_nothing_more_is_sent(server):
    server.mishaps = [refuse(422, message="Bad.", param="input")]
    server.delay_s = 0.05
    with pytest.raises(SequenceError):
        embed(server, ["MKT"] * 100, chunk_sequences=1, parallel=2)
    assert len(server.requests) <= 6


def test_a_rate_limit_slows_a_long_list_and_does_not_end_it(server):
    """Each request is refused longer than the window in all, but others are answered meanwhile."""
    server.mishaps = [refuse(429, "rate_limited", Retry_After="1") for _ in range(4)]
    server.mishaps += [None, *server.mishaps[:3], None, *server.mishaps[:2], None]
    vectors = embed(server, ["M", "MK", "MKT", "MKTA"], chunk_sequences=1, parallel=4, retry_s=3.1)
    assert vectors[:, 0].tolist() == [1, 2, 3, 4]


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("RAPTIDE_API_KEY", "from-the-environment")
    embed(server, ["MKT"])
    embed(server, ["MKT"], key="given-secret")
    keys = [headers["Authorization"] for _, headers in server.requests]
    assert keys == ["Bearer from-the-environment", "Bearer given-secret"]
    with Client(server.url, "given-secret") as client:
        assert "secret" not in repr(client) + repr(vars(client))
    assert "secret" not in caplog.text
    assert "MKT" not in caplog.text


def test_the_model_is_named_only_if_chosen(server):
    embed(server, ["MKT"])
    embed(server, ["MKT"], model="m")
    assert ["model" in body for body, _ in server.requests] == [False, True]


def test_an_empty_list_gives_an_empty_array(server):
    assert embed(server, []).shape == (0, WIDTH)
    with Client(server.url) as client:
        assert client.embed([], layers=[0, -1]).shape == (0, 2, WIDTH)
        assert client.embed([], "residue") == []
        assert client.score_sequences([]).shape == (0,)
        assert list(client.embed(iter([]))) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "begins with http://"),
        ({"url": "http://"}, "names no host"),
        ({"url": "http://127.0.0.1:port"}, "is no URL"),
        ({"parallel": 0}, "parallel must be at least 1"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"retry_s": float("nan")}, "retry_s must be"),
        ({"key": "two\nlines"}, "plain printable text"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Client(**({"url": "http://127.0.0.1:1"} | arguments))


def test_a_url_may_end_as_the_openai_client_wants_it(server):
    with Client(f"{server.url}/v1/") as client:
        assert client.models()[0]["id"] == "m"


def test_progress_is_shown_on_request_only(server, capsys):
    embed(server, ["MKT"] * 10)
    assert capsys.readouterr() == ("", "")
    embed(server, ["MKT"] * 10, progress=True)
    shown = capsys.readouterr()
    assert "10/10" in shown.err
    assert shown.out == ""
