"""One trace for each HTTP request, across front end and engine, and the metrics beside it. Needs the extra "otel"."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from softbatch.server.observability.gen_ai import OPERATIONS, GenAiMetrics, Operation, Value, request_attributes
from softbatch.server.observability.otlp_export import OtlpExport
from softbatch.server.observability.otlp_target import OtlpTarget
from softbatch.server.observability.request_record import RequestRecord
from softbatch.server.observability.sequence_spans import make_spans

# Asked again and again by probes, scrapers and consoles, or open for as long as somebody watches.
_QUIET = ("/health", "/ping", "/metrics", "/docs", "/openapi.json", "/console", "/v1/queue")
_REFUSED, CLIENT_GONE, _FAILED = 400, 499, 500


@dataclass(frozen=True)
class OpenTrace:
    """A request's span, and what takes its monotonic seconds to Unix nanoseconds. `path` is as it was sent."""

    span: Span
    path: str
    began: float
    offset: int

    def clock(self, at: float) -> int:
        return int(at * 1e9) + self.offset


class Tracing:
    """Owns what is exported. A request costs a span when it comes and the others when it has been answered."""

    def __init__(self, target: OtlpTarget, host: str, port: int) -> None:
        self._export = OtlpExport(target)
        self._tracer = self._export.tracer(
            "softbatch.server", {"softbatch.process": "server", "process.pid": os.getpid()}
        )
        self._engine: tuple[int, Tracer] | None = None
        self._engine_pid: Callable[[], int] = lambda: 0
        self._model = ""
        self._metrics = GenAiMetrics(self._export.meter("softbatch.server"))
        self._propagator = TraceContextTextMapPropagator()
        self._server: Mapping[str, Value] = {"server.address": _named(host), "server.port": port}

    def describe(self, model: str, engine_pid: Callable[[], int]) -> None:
        """What is known once the engine is up; its process changes when it dies."""
        self._model, self._engine_pid = model, engine_pid

    def begin(self, record: RequestRecord, method: str, path: str, headers: Mapping[str, str]) -> OpenTrace | None:
        """Open the span of a request that has just come, below the caller's if the headers name one; None for paths
        that are not traced. If the caller does not sample, neither does this."""
        if path.startswith(_QUIET) or path.endswith("/events"):
            return None
        began = time.monotonic()
        offset = time.time_ns() - int(began * 1e9)
        parent = self._propagator.extract(headers, Context())
        span = self._tracer.start_span(
            method,
            parent,
            kind=SpanKind.SERVER,
            start_time=int(began * 1e9) + offset,
            attributes={"http.request.method": method, "url.path": path, "url.scheme": "http", **self._server},
        )
        # With metrics alone there is no span, and the caller's trace stays where there is one.
        if (found := span.get_span_context()).is_valid:
            record.trace_id = format(found.trace_id, "032x")
        record.is_traced = span.is_recording()
        return OpenTrace(span, path, began, offset)

    def end(self, opened: OpenTrace, method: str, route: str | None, record: RequestRecord, status: int) -> None:
        """The request has been answered, or its client is gone (499): nothing here keeps anybody waiting. `route` is
        the one that was found, if any."""
        now = time.monotonic()
        operation = OPERATIONS.get(route or opened.path) if method == "POST" else None
        error = record.error or (
            str(status) if status >= _FAILED else "client_closed_request" if status == CLIENT_GONE else None
        )
        model = self._model
        if operation is not None:
            shared = {**self._server, "gen_ai.response.model": model} if record.started else self._server
            self._metrics.observe(record, operation, now - opened.began, shared, error)
        span = opened.span
        if not span.is_recording():
            return
        span.set_attributes(_http_attributes(record, route, status, error))
        if operation is not None:
            span.set_attributes(request_attributes(record, operation, model))
            self._make_children(opened, record, now)
        span.update_name(_name(method, route, operation, record, model))
        # What is refused with 4xx is the client's failure. A stream's status says nothing: it was sent before.
        if error is not None and not _REFUSED <= status < _FAILED:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(opened.clock(now))

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so long. Blocks."""
        self._export.close(seconds)

    def _make_children(self, opened: OpenTrace, record: RequestRecord, now: float) -> None:
        parent = trace.set_span_in_context(opened.span, Context())
        submitted = [active.submitted for active in record.started if active.submitted is not None]
        if submitted:
            preparing = self._tracer.start_span("prepare", parent, start_time=opened.clock(opened.began))
            preparing.end(opened.clock(max(submitted)))
        tracer = self._engine_tracer()
        for number, active in enumerate(record.started):
            common: dict[str, Value] = {"softbatch.choice": number} if len(record.started) > 1 else {}
            make_spans(active, parent, tracer, opened.clock, now, common)

    def _engine_tracer(self) -> Tracer:
        """With the engine process as its resource, whose times its spans are made of."""
        pid = self._engine_pid()
        if self._engine is None or self._engine[0] != pid:
            attributes: dict[str, str | int] = {"softbatch.process": "engine", "process.pid": pid}
            self._engine = (pid, self._export.tracer("softbatch.scheduler.engine", attributes))
        return self._engine[1]


def _named(host: str) -> str:
    """Who listens on all addresses is known by the machine's name."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host


def _name(method: str, route: str | None, operation: Operation | None, record: RequestRecord, model: str) -> str:
    """As the conventions for generative AI want it, or those for HTTP."""
    if operation is not None and record.started:
        return f"{operation.name} {record.model or model}"
    return f"{method} {route}" if route else method


def _http_attributes(record: RequestRecord, route: str | None, status: int, error: str | None) -> dict[str, Value]:
    found: dict[str, Value] = {"softbatch.request_id": record.id}
    if status != CLIENT_GONE:
        found["http.response.status_code"] = status
    if route:
        found["http.route"] = route
    if record.owner:
        found["softbatch.key"] = record.owner
    if error is not None:
        found["error.type"] = error
    return found
