"""An endpoint in this process that embeds, refuses, breaks off, forgets and dies, as it is told."""

import json
import math
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa

WIDTH = 4
ARROW = "application/vnd.apache.arrow.stream"


class Handler(BaseHTTPRequestHandler):
    """Embeds a sequence as its length, in every place; `mishaps` come first, one a request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        model = {"id": "m", "width": WIDTH, "max_residues": self.server.max_residues}
        listed = {"id": "m"} if self.server.idle else model
        found = {"data": [listed]} if self.path == "/v1/models" else model
        self.answer(200, json.dumps(found).encode())

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
            if mishap is not None:
                mishap(self)
            elif server.respond is not None:
                server.respond(self, body)
            else:
                depth = len(body.get("layers", [-1]))
                each = body["pooling"] == "residue"
                stream = arrow(body["input"], depth, each)
                as_arrow = self.headers["Accept"] == ARROW
                self.embed(body["input"], stream if as_arrow else None)
        finally:
            with server.lock:
                server.running -= 1

    def embed(self, sequences, stream=None, headers=None):
        if stream is not None:
            return self.answer(200, stream, {"Content-Type": ARROW})
        data = [
            {"index": i, "embedding": [float(len(s))] * WIDTH, "shape": [WIDTH]}
            for i, s in enumerate(sequences)
        ]
        return self.answer(200, json.dumps({"data": data[::-1]}).encode(), headers)

    def embed_as(self, digest, sequences):
        data = [
            {"index": i, "embedding": [float(digest), float(len(s))], "shape": [2]}
            for i, s in enumerate(sequences)
        ]
        headers = {
            "X-Raptide-Model": "m",
            "X-Raptide-Weights": digest,
            "X-Raptide-Step": "7",
            "Server-Timing": "queue;dur=20.0, compute;dur=30.0",
        }
        self.answer(200, json.dumps({"data": data}).encode(), headers)

    def answer(self, status, content, headers=None, announced=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def arrow(sequences, depth=1, each=True):
    """A stream of arrays full of each sequence's length: [depth, L, WIDTH], [L, WIDTH], ..."""
    sink = pa.BufferOutputStream()
    schema = pa.schema(
        {"index": pa.int64(), "values": pa.list_(pa.float32()), "shape": pa.list_(pa.int64())}
    )
    with pa.ipc.new_stream(sink, schema) as writer:
        for index, sequence in enumerate(sequences):
            shape = [*([depth] if depth > 1 else []), *([len(sequence)] if each else []), WIDTH]
            values = [float(len(sequence))] * math.prod(shape)
            writer.write_batch(pa.record_batch([[index], [values], [shape]], schema=schema))
    return sink.getvalue().to_pybytes()


def refuse(status, type="invalid_request", message="No.", param=None, **headers):
    content = json.dumps({"error": {"type": type, "message": message, "param": param}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.answer(status, content, named)


def say(status, text, content_type="text/plain"):
    return lambda handler: handler.answer(status, text, {"Content-Type": content_type})


def left(handler, within_s):
    """Whether the client closes its connection before an answer."""
    ready, _, _ = select.select([handler.connection], [], [], within_s)
    return bool(ready) and handler.connection.recv(1, socket.MSG_PEEK) == b""


def versions(current, supports_pins=True):
    """Answers as weights whose digest `current(number of the request)` names would: a vector holds
    the digest and the length of its sequence.

    Args:
        current: digests that answer now, given how many requests came before; the first answers
            who pins none.
    """

    def respond(handler, body):
        server = handler.server
        with server.lock:
            alive = current(len(server.requests) - 1)
        pinned = handler.headers.get("X-Raptide-Weights") if supports_pins else None
        if pinned is not None and pinned not in alive:
            return refuse(410, "gone", f"Weights {pinned} are not served any more.")(handler)
        digest = pinned or alive[0]
        handler.embed_as(digest, body["input"])

    return respond


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler):
    handler.answer(200, b'{"data": [', announced=500)
    hang_up(handler)


def lose_a_row(handler):
    sequences = handler.server.requests[-1][0]["input"]
    handler.embed(sequences, arrow(sequences[:-1]))


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
        self.max_residues = 1022
        self.idle = False
        """Whether the model has no replica that tells what it is until it is asked for alone."""
        self.respond = None
        """Answers instead, given the handler and the body."""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that leave are part of the tests

    def die(self):
        self.shutdown()
        self.server_close()
