"""Where traces go, what is said if they cannot, and that a collector which is no good holds nobody up."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterator

import pytest

from softbatch.server.http.auth import is_probe
from softbatch.server.http.errors import TGI_PATHS
from softbatch.server.observability.otlp_target import OtlpTarget, otlp_target, shown, without_credentials
from softbatch.server.observability.request_record import RequestRecord
from softbatch.server.requests.engine_supervisor import StartupError
from softbatch.server.services import _tracing
from softbatch.server.settings import Settings
from tests.support.otlp_collector import running_collector
from tests.support.servers import wait_for

BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"
HTTP = {BASE: "http://c:4318"}


@pytest.mark.parametrize(
    ("flag", "environ", "traces", "metrics"),
    [
        ("http://f", {}, "http://f/v1/traces", "http://f/v1/metrics"),
        ("http://f", HTTP, "http://f/v1/traces", "http://f/v1/metrics"),
        ("http://f", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"}, "http://f/v1/traces", "http://f/v1/metrics"),
        (None, HTTP, "http://c:4318/v1/traces", "http://c:4318/v1/metrics"),
        (None, {BASE: "http://c:4318/"}, "http://c:4318/v1/traces", "http://c:4318/v1/metrics"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"}, "http://t/x", None),
        (None, HTTP | {"OTEL_METRICS_EXPORTER": "none"}, "http://c:4318/v1/traces", None),
        ("http://f", {"OTEL_TRACES_EXPORTER": "none"}, None, "http://f/v1/metrics"),
    ],
)
def test_flag_and_environment(
    flag: str | None, environ: dict[str, str], traces: str | None, metrics: str | None
) -> None:
    assert otlp_target(flag, environ) == OtlpTarget(traces, metrics, is_flag=flag is not None)


@pytest.mark.parametrize("environ", [{}, {BASE: " "}, HTTP | {"OTEL_SDK_DISABLED": "true"}])
def test_off(environ: dict[str, str]) -> None:
    assert otlp_target(None, environ) is None


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"])
def test_grpc_is_refused(variable: str) -> None:
    with pytest.raises(ValueError, match=rf"{variable}=grpc.*http/protobuf.*4318"):
        otlp_target(None, HTTP | {variable: "grpc"})
    assert otlp_target(None, HTTP | {variable: "http/protobuf"}) is not None


class TestWithoutTheExtra:
    @pytest.fixture(autouse=True)
    def _is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tracing", "otlp_export"):
            monkeypatch.delitem(sys.modules, f"softbatch.server.observability.{name}", raising=False)
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    def test_the_flag_is_refused_with_what_to_install(self) -> None:
        with pytest.raises(StartupError, match=r"--otlp-endpoint: .*pip install 'softbatch\[otel\]'"):
            _tracing(Settings(otlp_endpoint="http://f"))

    def test_a_variable_that_others_set_is_no_reason_not_to_start(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv(BASE, "http://c:4318")
        assert _tracing(Settings()) is None
        assert "softbatch[otel]" in caplog.text

    def test_off_needs_nothing(self) -> None:
        assert _tracing(Settings()) is None


@pytest.fixture
def black_hole() -> Iterator[str]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_collector_that_never_answers_blocks_neither_spans_nor_the_end(
    black_hole: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from softbatch.server.observability.otlp_export import OtlpExport

    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setenv(
        "OTEL_EXPORTER_OTLP_TIMEOUT", "3600"
    )  # whoever waited would wait for longer than a test may take
    export = OtlpExport(OtlpTarget(f"{black_hole}/v1/traces", f"{black_hole}/v1/metrics", is_flag=True))
    tracer = export.tracer("test", {"softbatch.process": "server"})
    for _ in range(1000):
        tracer.start_span("x").end()
    assert len(export._spans._batch_processor._queue) <= 16  # type: ignore[union-attr]
    export.close(0.2)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "nothing for each span"


def test_a_collector_without_metrics_is_told_of_once_and_gets_every_span(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from softbatch.server.observability.otlp_export import OtlpExport

    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    caplog.set_level(logging.INFO)
    with running_collector() as collector:
        collector.missing = ("/v1/metrics",)
        export = OtlpExport(OtlpTarget(f"{collector.url}/v1/traces", f"{collector.url}/v1/metrics", is_flag=True))
        tracer = export.tracer("test", {"softbatch.process": "server"})
        export.meter("test").create_counter("some").add(1)
        for name in ("first", "second"):
            tracer.start_span(name).end()
            assert export._spans is not None
            export._spans.force_flush()
            sent = collector.requests
            wait_for(lambda sent=sent: collector.requests > sent, "no metrics are sent")  # type: ignore[misc]
        wait_for(lambda: "does not take metrics" in caplog.text, "nothing was said")
        tracer.start_span("last").end()
        export.close(5)
    assert [span.name for span in collector.spans] == ["first", "second", "last"]
    assert caplog.text.count("does not take") == 1
    assert "takes traces again" not in caplog.text


@pytest.mark.parametrize(
    ("url", "in_the_log"),
    [
        ("http://c:4318/v1/traces", "http://c:4318/v1/traces"),
        ("https://me:pass@c:4318/otlp/v1/traces", "https://c:4318/otlp/v1/traces"),
        ("https://pass@c/v1/traces", "https://c/v1/traces"),
        ("https://me:p@ss@c/v1/traces", "https://c/v1/traces"),
        ("https://c/v1/traces?api-key=pass", "https://c/v1/traces"),
        ("https://c/v1/traces#pass", "https://c/v1/traces"),
        ("https://c?to=/a@pass", "https://c"),
        ("https://[::1]:4318/v1/traces", "https://[::1]:4318/v1/traces"),
        ("me:pass@c:4318/v1/traces", "c:4318/v1/traces"),
        ("//me:pass@c/v1/traces", "//c/v1/traces"),
    ],
)
def test_credentials_in_an_address_are_not_shown(url: str, in_the_log: str) -> None:
    assert shown(url) == in_the_log
    for said in (f"Invalid URL '{url}': no", f"No host: {url}", f"refused: {url.partition('c')[2]}"):
        assert "pass" not in without_credentials(said, url), said


def test_the_log_has_no_credentials_of_a_collector_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from softbatch.server.observability.otlp_export import OtlpExport

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"http://me:pass@127.0.0.1:{port}/v1/traces?key=word", "other://me:pass@c/v1/traces?key=word"):
        export = OtlpExport(OtlpTarget(url, None, is_flag=False))
        export.tracer("test", {"softbatch.process": "server"}).start_span("x").end()
        export.close(5)
    assert caplog.text.count("does not take traces") == 2
    assert not [secret for secret in ("me:", "pass", "word") if secret in caplog.text]


def test_without_traces_a_request_has_its_callers_trace_or_none() -> None:
    from softbatch.server.observability.tracing import Tracing

    tracing = Tracing(OtlpTarget(None, "http://127.0.0.1:1/v1/metrics", is_flag=True), "127.0.0.1", 1)
    alone, called = RequestRecord("a"), RequestRecord("b")
    assert tracing.begin(alone, "GET", "/v1/models", {}) is not None
    caller = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    assert tracing.begin(called, "GET", "/v1/models", caller) is not None
    tracing.close(1)
    assert alone.trace_id is None
    assert called.trace_id == "1" * 32


def test_what_platforms_call_otherwise_is_traced_as_what_it_is() -> None:
    from softbatch.server.observability.gen_ai import OPERATIONS
    from softbatch.server.observability.tracing import Tracing

    assert {OPERATIONS[path].name for path in TGI_PATHS} == {"text_completion"}
    tracing = Tracing(OtlpTarget(None, "http://127.0.0.1:1/v1/metrics", is_flag=True), "127.0.0.1", 1)
    probes = ("/ping", "/health", "/health/live", "/health/ready")
    assert all(is_probe(path) for path in probes)
    assert [tracing.begin(RequestRecord("a"), "GET", path, {}) for path in probes] == [None] * len(probes)
    tracing.close(1)
