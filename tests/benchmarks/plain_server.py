"""An embedding endpoint as one writes it in an afternoon: FastAPI, transformers, a forward each.

    python plain_server.py MODEL PORT

Speaks the part of OpenAI's protocol that the load generator uses. The endpoint is a plain function,
which FastAPI runs in threads. With `--one-at-a-time` it is a coroutine, and forwards follow each
other: less concurrency, but no threads that fight for the cores.
"""

from __future__ import annotations

import argparse
import base64
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from transformers import EsmModel, EsmTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("port", type=int)
parser.add_argument("--one-at-a-time", action="store_true")
args = parser.parse_args()

model = EsmModel.from_pretrained(args.model, add_pooling_layer=False).eval()
tokenizer = EsmTokenizer.from_pretrained(args.model)
app = FastAPI()


def embed(request: dict[str, Any]) -> dict[str, Any]:
    tokens = tokenizer(request["input"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    data = []
    for index, sequence in enumerate(request["input"]):
        mean = hidden[index, 1 : 1 + len(sequence)].mean(0).numpy()
        raw = np.ascontiguousarray(mean, "<f4").tobytes()
        data.append({"index": index, "embedding": base64.b64encode(raw).decode()})
    return {"object": "list", "data": data}


async def embed_at_once(request: dict[str, Any]) -> dict[str, Any]:
    return embed(request)


app.post("/v1/embeddings")(embed_at_once if args.one_at_a_time else embed)


@app.get("/v1/models")
def models() -> dict[str, Any]:
    return {"data": [{"id": "plain"}]}


uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")
