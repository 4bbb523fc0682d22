"""Prints as JSON what one large answer costs a gateway in this process: `large_answer.py ENCODING`.

answer_bytes: what was sent; peak_bytes: by how much the resident memory grew meanwhile at most;
health_s: how long each /healthz took meanwhile, in CPU seconds of this process: on a busy machine
others' work must not count.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import fake_replicas
import psutil

SEQUENCE = "A" * 1000
BYTES_A_RESIDUE = {"float": 1280 * 11, "base64": 1280 * 16 / 3, "arrow": 1280 * 4}
ARROW = "application/vnd.apache.arrow.stream"


async def post(app, body, accept, send):
    """One request to the ASGI application itself."""
    content = json.dumps(body).encode()
    waiting = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive():
        return waiting.pop() if waiting else await asyncio.sleep(600)

    headers = [(b"content-type", b"application/json"), (b"accept", accept.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http"}
    scope["asgi"] = {"spec_version": "2.4"}
    await app(scope, receive, send)


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


async def measure(encoding, megabytes=110):
    app, _ = fake_replicas.make_app(
        fake_replicas.FakeReplicas(width=1280), max_json_bytes=2**30, max_body_bytes=2**20
    )
    accept = ARROW if encoding == "arrow" else "application/json"
    body = {"pooling": "residue"} | ({} if encoding == "arrow" else {"encoding_format": encoding})
    sent, status, health_s = 0, None, []

    async def send(message):
        nonlocal sent, status
        sent += len(message.get("body", b""))
        status = message.get("status", status)

    async def ask_health():
        async with fake_replicas.http_client(app) as client:
            while True:
                began = time.process_time()
                await asyncio.sleep(0.005)
                await client.get("/healthz")
                health_s.append(time.process_time() - began)

    await post(app, body | {"input": SEQUENCE}, accept, send)  # whatever is loaded once
    sent = 0
    count = round(megabytes * 1e6 / len(SEQUENCE) / BYTES_A_RESIDUE[encoding])
    health = asyncio.create_task(ask_health())
    await asyncio.sleep(0.1)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    await post(app, body | {"input": [SEQUENCE] * count}, accept, send)
    peak = peak_bytes() - before
    await asyncio.sleep(0.1)  # whoever asked meanwhile is answered now
    health.cancel()
    return {"status": status, "answer_bytes": sent, "peak_bytes": peak, "health_s": health_s}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(sys.argv[1]))))
