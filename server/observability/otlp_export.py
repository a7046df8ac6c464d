"""The way of spans and metrics to a collector: bounded, and in threads of their own."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Meter, NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import NoOpTracerProvider, Tracer

from softbatch.server.observability.otlp_target import OtlpTarget, shown, without_credentials
from softbatch.server.version import VERSION

logger = logging.getLogger(__name__)
# Of the SDK: they say at each attempt what is said once here.
_NOISY = "opentelemetry.exporter"
_OF_SPANS = (OTLPSpanExporter.__module__, "opentelemetry.sdk._shared_internal")
_OF_METRICS = (OTLPMetricExporter.__module__, "opentelemetry.sdk.metrics._internal.export")
_GRPC_PORT = ":4317"


class _Health(logging.Handler):
    """Whether the collector takes one signal, said when that changes; takes the place of the SDK's own log of it."""

    def __init__(self, signal: str, endpoint: str, noisy: Sequence[str]) -> None:
        super().__init__()
        self._signal, self._endpoint = signal, endpoint
        self._reason = ""
        self.is_down = False
        _divert(_NOISY, logging.NullHandler())
        for name in noisy:
            _divert(name, self)
        logger.info("%s go to %s", signal, shown(endpoint))

    def emit(self, record: logging.LogRecord) -> None:
        self._reason = without_credentials(record.getMessage(), self._endpoint)

    def note(self, success: bool) -> None:
        collector = shown(self._endpoint)
        if success and self.is_down:
            logger.info("the collector at %s takes %s again", collector, self._signal)
        elif not success and not self.is_down:
            hint = "; port 4317 is usually for gRPC, 4318 for HTTP" if f"{_GRPC_PORT}/" in f"{collector}/" else ""
            logger.warning(
                "the collector at %s does not take %s, which are dropped until it does (%s)%s",
                collector,
                self._signal,
                self._reason or "no reason given",
                hint,
            )
        self.is_down = not success


def _divert(name: str, handler: logging.Handler) -> None:
    noisy = logging.getLogger(name)
    noisy.handlers, noisy.propagate = [handler], False


class _SpanExporter(OTLPSpanExporter):
    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.health = _Health("traces", endpoint, _OF_SPANS)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self.health.note(result is SpanExportResult.SUCCESS)
        return result


class _MetricExporter(OTLPMetricExporter):
    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.health = _Health("metrics", endpoint, _OF_METRICS)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **kwargs)
        self.health.note(result is MetricExportResult.SUCCESS)
        return result


class OtlpExport:
    """Owns exporters, their queue and their threads. Spans that find the queue full are dropped."""

    def __init__(self, target: OtlpTarget) -> None:
        self._instance = str(uuid.uuid4())
        self._spans: BatchSpanProcessor | None = None
        self._meters: MeterProvider | None = None
        self._exporters: list[_SpanExporter | _MetricExporter] = []
        if target.traces:
            spans = _SpanExporter(target.traces)
            self._spans = BatchSpanProcessor(spans)
            self._exporters.append(spans)
        if target.metrics:
            metrics = _MetricExporter(target.metrics)
            reader = PeriodicExportingMetricReader(metrics)
            self._meters = MeterProvider(
                [reader], self._resource({"softbatch.process": "server"}), shutdown_on_exit=False
            )
            self._exporters.append(metrics)

    def tracer(self, scope: str, resource: Mapping[str, str | int]) -> Tracer:
        """Of one process, which `resource` tells from the others."""
        if self._spans is None:
            return NoOpTracerProvider().get_tracer(scope)
        provider = TracerProvider(resource=self._resource(resource), shutdown_on_exit=False)
        provider.add_span_processor(self._spans)
        return provider.get_tracer(scope, VERSION)

    def meter(self, scope: str) -> Meter:
        provider = self._meters or NoOpMeterProvider()
        return provider.get_meter(scope, VERSION)

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so long; a collector that is down for a signal is not waited for. Blocks."""
        for exporter in self._exporters:
            if exporter.health.is_down:
                exporter.shutdown()
        # A daemon: a collector that takes a connection and never answers must not keep the process alive.
        sending = threading.Thread(target=self._shut_down, daemon=True, name="otlp-close")
        sending.start()
        sending.join(seconds)

    def _shut_down(self) -> None:
        if self._spans is not None:
            self._spans.shutdown()  # type: ignore[no-untyped-call]
        if self._meters is not None:
            self._meters.shutdown()

    def _resource(self, of_process: Mapping[str, str | int]) -> Resource:
        """What the environment says goes before what is assumed here."""
        named = OTELResourceDetector().detect().attributes
        assumed: dict[str, str | int] = {
            "service.name": "softbatch",
            "service.version": VERSION,
            "service.instance.id": f"{self._instance}/{of_process['softbatch.process']}",
        }
        kept = {name: value for name, value in assumed.items() if name not in named}
        return Resource.create({**kept, **of_process})
