"""Ctrl-C ends a call within a second, whatever it waits for, and the endpoint is told."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest
from fake_endpoint import Server, left, refuse

PATIENCE_S = 20.0


@pytest.fixture
def server():
    server = Server()
    yield server
    server.die()


def interrupt(server, calls, requests, after="raise"):
    """Run calls in a process of its own and interrupt it once `requests` have come.

    Returns:
        Seconds until the call was over; what the process wrote before it ended.
    """
    script = (
        textwrap.dedent(
            """
        import sys, time
        from raptide import Client
        client = Client(sys.argv[1], chunk_sequences=1, parallel=4)
        try:
            CALLS
        except KeyboardInterrupt:
            print(time.time(), flush=True)
            AFTER
        """
        )
        .replace("CALLS", calls)
        .replace("AFTER", after)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where pytest runs in the background, Ctrl-C would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + PATIENCE_S
    while len(server.requests) < requests:
        assert time.monotonic() < until, process.stderr.read()
        time.sleep(0.01)
    started = time.time()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S / 2)
    over, *rest = out.splitlines()
    return float(over) - started, rest, err


@pytest.mark.parametrize(
    "calls",
    [
        "client.embed(['MKT'] * 100)",
        "list(client.embed(iter(['MKT'] * 100)))",
        "with client: client.embed(['MKT'] * 100)",
    ],
    ids=["a list", "a generator", "a with block"],
)
def test_four_requests_in_flight_are_called_off(server, calls):
    gone = []
    server.respond = lambda handler, body: gone.append(left(handler, PATIENCE_S))
    seconds, _, err = interrupt(server, calls, 4)
    assert seconds < 1
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "destroyed" not in err
    assert "Exception ignored" not in err
    until = time.monotonic() + PATIENCE_S
    while len(gone) < 4:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert gone == [True] * 4


def test_one_request_is_called_off(server):
    server.respond = lambda handler, body: left(handler, PATIENCE_S)
    seconds, _, err = interrupt(server, "client.scan('MKT')", 1)
    assert seconds < 1
    assert err.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("calls", ["client.embed(['MKT'] * 100)", "client.scan('MKT')"])
def test_a_pause_is_called_off(server, calls):
    server.mishaps = [refuse(503, Retry_After="60")] * 100
    seconds, _, err = interrupt(server, calls, 1)
    assert seconds < 1
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_the_client_goes_on_after_an_interrupt(server):
    """As in a notebook: the connections that were given up are no longer counted."""
    waiting = list(range(4))

    def respond(handler, body):
        with handler.server.lock:
            first = bool(waiting and waiting.pop() is not None)
        if first:
            left(handler, PATIENCE_S)
        else:
            handler.embed(body["input"])

    server.respond = respond
    after = "print(client.embed(['MKT'] * 20)[:, 0].sum())"
    seconds, out, err = interrupt(server, "client.embed(['MKT'] * 100)", 4, after)
    assert seconds < 1
    assert (out, err) == (["60.0"], "")


def test_a_generator_that_is_abandoned_calls_off_what_is_in_flight(server):
    from raptide import Client

    gone = []

    def respond(handler, body):
        if len(body["input"][0]) == 1:
            handler.embed(body["input"])
        else:
            gone.append(left(handler, PATIENCE_S))

    server.respond = respond
    with Client(server.url, chunk_sequences=1, parallel=2) as client:
        results = client.embed(iter(["M", *["MK"] * 20]))
        next(results)
        results.close()
        until = time.monotonic() + PATIENCE_S
        # Of all but the first, which may be one or two.
        while len(gone) < max(1, len(server.requests) - 1) and time.monotonic() < until:
            time.sleep(0.01)
    assert gone
    assert all(gone)
