"""The client against a local server that refuses, breaks off, forgets and dies."""

import base64
import json
import socket
import ssl
import subprocess
import threading
import time
from email.utils import formatdate

import numpy as np
import pyarrow as pa
import pytest
from fake_endpoint import (
    ARROW,
    WIDTH,
    Server,
    arrow,
    break_off,
    cut_the_stream,
    hang_up,
    lose_a_row,
    refuse,
    say,
)

from raptide import Client, ConfigError, SequenceError, ServiceError


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
        say(503, b"Service Unavailable"),
        say(404, b"Path '/v1/embeddings' not found. Ping http://h/-/routes for available routes."),
        say(504, b"Gateway Timeout"),
        say(500, b"Internal Server Error"),
        hang_up,
        break_off,
    ],
    ids=[
        "429",
        "502",
        "503",
        "Serve's 503",
        "Serve's 404",
        "504",
        "a proxy's 500",
        "hang-up",
        "half an answer",
    ],
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
        (say(404, b"<html>nginx</html>", "text/html"), ServiceError, "404 Not Found without"),
        (say(405, b"Method Not Allowed"), ServiceError, "405"),
        (say(200, b"<html>hello</html>"), ServiceError, "is it a Raptide endpoint"),
        (say(302, b""), ServiceError, "302"),
        (refuse(301, Location="https://x.org/v1"), ServiceError, "has moved to https://x.org/v1;"),
    ],
)
def test_a_final_answer_is_one_error_and_asked_once(server, mishap, error, message):
    server.mishaps = [mishap]
    with pytest.raises(error, match=message) as caught:
        embed(server, ["MKT"])
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_plain_500_is_tried_a_few_times_only(server):
    server.mishaps = [say(500, b"Internal Server Error")] * 20
    with pytest.raises(ServiceError, match="500 Internal Server Error without saying why"):
        embed(server, ["MKT"])
    assert len(server.requests) == 4


def test_a_failure_inside_the_endpoint_is_named_as_its_log_names_it(server):
    server.mishaps = [refuse(500, "internal", "Failed inside.")]
    with Client(server.url) as client, pytest.raises(ServiceError, match=r"\(request mine-0\)\.$"):
        client.embed(["MKT"], request_id="mine")
    assert server.requests[0][1]["X-Request-Id"] == "mine-0"


def rows(*data):
    return say(200, json.dumps({"data": data}).encode(), "application/json")


def row(index=0, embedding=(1.0,) * WIDTH, shape=(WIDTH,)):
    return {"index": index, "embedding": embedding, "shape": shape}


def base64_of(*numbers):
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        (rows(row(embedding=base64_of(1, float("nan"), 1, 1))), "not all numbers"),
        (rows(row(embedding=[1, 2, None, 4])), "with what is none"),
        (rows(row(embedding=base64_of(1, 2, 3))), "with what is none"),
        (rows(row(embedding="no base64!")), "with what is none"),
        (rows(row(embedding={"a": 1})), "with what is none"),
        (rows(row(shape=[2, 2])), r"3 residues has \(2, 2\) numbers"),
        (rows(row(), row(1)), "a row 1 of 1"),
        (rows(row(-1)), "a row -1 of 1"),
        (rows(row("0")), "a row '0' of 1"),
        (rows(row(), row()), "or has it twice"),
        (rows(), "answered 0 of 1 sequences"),
        (rows({"index": 0}), "with what is none"),
        (say(200, b"[]"), "with what is none"),
        (say(200, b'{"data": 3}'), "with what is none"),
        (say(200, b"\xff\xfe"), "with what is none"),
    ],
)
def test_a_malformed_answer_is_a_service_error_and_asked_for_once(server, mishap, message):
    server.mishaps = [mishap]
    with pytest.raises(ServiceError, match=message) as caught:
        embed(server, ["MKT"])
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("sequences", "message"),
    [(["MKTA", "MK"], r"sequence 0 of 3 residues has \(4, 4\)"), (["", "MK"], "has .0, 4.")],
)
def test_an_arrow_stream_of_other_shapes_is_a_service_error(server, sequences, message):
    server.mishaps = [say(200, arrow(sequences), ARROW)]
    with pytest.raises(ServiceError, match=message):
        embed(server, ["MKT", "MK"], "residue")


def test_an_arrow_stream_of_nans_or_other_columns_is_a_service_error(server):
    nan = pa.record_batch([[0], [[float("nan")] * 3], [[3, 1]]], names=["index", "values", "shape"])
    other = pa.record_batch([[0]], names=["index"])
    for batch, message in ((nan, "not all numbers"), (other, "with what is none")):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        server.mishaps = [say(200, sink.getvalue().to_pybytes(), ARROW)]
        with pytest.raises(ServiceError, match=message):
            embed(server, ["MKT"], "residue")


def test_vectors_of_two_widths_are_a_service_error(server):
    server.mishaps = [None, rows(row(embedding=[1.0], shape=[1]))]
    with pytest.raises(ServiceError, match=r"shapes \(1,\) and \(4,\)"):
        embed(server, ["MKT", "MK"], chunk_sequences=1, parallel=1)


def test_a_score_that_is_no_number_is_a_service_error(server):
    for score, message in ((float("nan"), "is nan"), (None, "what is none"), ("x", "what is none")):
        server.mishaps = [rows({"index": 0, "score": score})]
        with Client(server.url) as client, pytest.raises(ServiceError, match=message):
            client.score_sequences(["MKT"], "one-pass")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Files of a certificate for 127.0.0.1, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=endpoint", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls_server(certificates):
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    yield server
    server.die()


def test_a_certificate_nobody_vouches_for_is_refused_at_once_and_taken_from_its_file(
    tls_server, certificates
):
    url = tls_server.url.replace("http", "https")
    started = time.monotonic()
    with Client(url) as client, pytest.raises(ServiceError, match=r"certificate.*verify=FILE"):
        client.embed(["MKT"])
    assert time.monotonic() - started < 2
    context = ssl.create_default_context(cafile=str(certificates[0]))
    for verify in (certificates[0], str(certificates[0]), context, False):
        with Client(url, verify=verify) as client:
            assert client.embed(["MKT"])[0, 0] == 3


def test_tls_with_an_endpoint_that_speaks_none_is_told_at_once(server):
    started = time.monotonic()
    client = Client(server.url.replace("http", "https"))
    with client, pytest.raises(ServiceError, match="is it http:// instead"):
        client.embed(["MKT"])
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "options", [{"verify": "/no/such.pem"}, {"cert": "/no/such.pem"}, {"cert": __file__}]
)
def test_files_that_hold_no_certificates_are_refused_at_once(options):
    with pytest.raises(ConfigError, match="TLS cannot be set up"):
        Client("https://127.0.0.1:1", **options)


def test_a_host_nobody_knows_is_told_at_once_and_one_nobody_knows_yet_is_waited_for(
    server, monkeypatch
):
    look_up, errors = socket.getaddrinfo, [socket.gaierror(socket.EAI_NONAME, "unknown")]

    def fail_first(*arguments, **options):
        if errors:
            raise errors.pop()
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fail_first)
    with Client(f"http://localhost:{server.server_port}") as client:
        started = time.monotonic()
        with pytest.raises(ServiceError, match="no host of that name"):
            client.embed(["MKT"])
        assert time.monotonic() - started < 1
        assert not server.requests
        errors.append(socket.gaierror(socket.EAI_AGAIN, "later"))
        assert client.embed(["MKT"])[0, 0] == 3


def test_a_call_may_have_a_timeout_of_its_own(server, monkeypatch):
    monkeypatch.setattr("raptide.client.transport.GRACE_S", 0.1)
    server.delay_s = 1.0
    with Client(server.url) as client:
        with pytest.raises(ServiceError, match=r"did not answer within 0\.2 s"):
            client.embed(["MKT"], timeout_s=0.2)
        with pytest.raises(ConfigError, match="timeout_s must be"):
            client.embed(["MKT"], timeout_s=0)
        with pytest.raises(ConfigError, match="request_id is plain text"):
            client.embed(["MKT"], request_id="two\nlines")
    assert server.requests[0][1]["X-Raptide-Timeout-S"] == "0.2"


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
    for bad, message in (
        (["MK", "M1"], "Sequence 1: .*'1'"),
        (["MK", 3], "Sequence 1: .* int"),
        ({"a": "MK"}, "list.it.values"),
        ({"MK"}, "sorted.it."),
    ):
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


def test_an_idle_model_is_asked_for_alone(server):
    server.idle = True
    assert embed(server, []).shape == (0, WIDTH)


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
