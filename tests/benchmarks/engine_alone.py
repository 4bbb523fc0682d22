"""The bare engine in a process of its own: a JSON list of sequences in, seconds to embed them out.

python engine_alone.py MODEL
"""

from __future__ import annotations

import json
import sys
import time

from raptide import Engine

engine = Engine.load(sys.argv[1], device="cpu")
engine.embed(["MKTAYIAKQR" * 20] * 4)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    sequences = json.loads(line)
    started = time.perf_counter()
    engine.embed(sequences)
    print(json.dumps(time.perf_counter() - started), flush=True)
