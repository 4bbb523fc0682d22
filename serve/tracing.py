"""Where spans go: to the collector that OpenTelemetry's own variables name.

FastAPI and Serve make the spans, of gateways and of replicas; those on the way from one to the
other hold the request's id. This is their `exporter_import_path` (`tracing_config` in the
deployment file). It needs the package opentelemetry-exporter-otlp-proto-http; without it there are
no spans.
"""

from __future__ import annotations

from typing import Any


def exporter() -> list[Any]:
    """Processors of spans: one that sends them to OTEL_EXPORTER_OTLP_ENDPOINT in the background."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return []
    return [BatchSpanProcessor(OTLPSpanExporter())]
