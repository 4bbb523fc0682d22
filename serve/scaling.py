"""How many replicas: so many that each has its share of the tokens that wait or are computed."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

METRIC = "pending_tokens"


class TokenScaling:
    """A policy for Serve's autoscaler; replicas report METRIC (`Replica.record_autoscaling_stats`).

    A replica that has reported nothing yet is no idle replica: while one is missing, nothing is
    stopped. From zero, requests that wait at the gateways bring the first replica.

    Args:
        target_tokens: pending tokens a replica should have.
    """

    def __init__(self, target_tokens: int) -> None:
        self._target_tokens = target_tokens

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = (ctx.aggregated_metrics or {}).get(METRIC, {})
        current = ctx.current_num_replicas
        if current == 0:
            return (1 if ctx.total_num_requests > 0 else 0), {}
        pending = sum(reported.values())
        wanted = math.ceil(pending / self._target_tokens)
        if wanted == 0 and ctx.total_num_requests > 0:
            wanted = 1
        if len(reported) < current:
            wanted = max(wanted, ctx.target_num_replicas)
        return wanted, {}
