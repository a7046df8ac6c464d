"""A small OpenTelemetry collector: takes OTLP over HTTP and keeps what it got."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


@dataclass(frozen=True)
class GotSpan:
    """A span as it arrived; ids in hexadecimal, times in Unix seconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: float
    end: float
    status: int
    attributes: dict[str, Any]
    events: tuple[str, ...]
    resource: dict[str, Any]
    scope: str


@dataclass
class Collector:
    """`status` is what it answers, so that it can be broken for a while, nothing while `may_answer` is not set; what is
    sent to `missing` paths gets 404."""

    url: str
    status: int = 200
    missing: tuple[str, ...] = ()
    spans: list[GotSpan] = field(default_factory=list)
    points: dict[str, list[tuple[dict[str, Any], Any]]] = field(default_factory=dict)
    requests: int = 0
    may_answer: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_answer.set()

    def trace(self, trace_id: str) -> list[GotSpan]:
        return [span for span in list(self.spans) if span.trace_id == trace_id]

    def take(self, path: str, body: bytes) -> None:
        self.requests += 1
        if self.status != 200:
            return
        if path == "/v1/traces":
            self.spans += _spans(ExportTraceServiceRequest.FromString(body))
        elif path == "/v1/metrics":
            self.points.update(_points(ExportMetricsServiceRequest.FromString(body)))
        else:
            raise AssertionError(path)


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if is_missing := self.path in collector.missing:
                collector.requests += 1
            else:
                collector.take(self.path, body)
            collector.may_answer.wait()
            self.send_response(404 if is_missing else collector.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.may_answer.set()
        server.shutdown()
        server.server_close()


def _spans(request: ExportTraceServiceRequest) -> Iterator[GotSpan]:
    for by_resource in request.resource_spans:
        for by_scope in by_resource.scope_spans:
            for span in by_scope.spans:
                yield GotSpan(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    kind=span.kind,
                    start=span.start_time_unix_nano / 1e9,
                    end=span.end_time_unix_nano / 1e9,
                    status=span.status.code,
                    attributes=_values(span.attributes),
                    events=tuple(event.name for event in span.events),
                    resource=_values(by_resource.resource.attributes),
                    scope=by_scope.scope.name,
                )


def _points(request: ExportMetricsServiceRequest) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    return {
        metric.name: [(_values(point.attributes), point) for point in metric.histogram.data_points]
        for by_resource in request.resource_metrics
        for by_scope in by_resource.scope_metrics
        for metric in by_scope.metrics
    }


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, str(kind))
