"""Traces and metrics as a real collector gets them: one trace for each request, front end and engine both."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softbatch.prompt_store.manifest import ModelSpec
from tests.support.models import make_soft_prompt, save_prompt
from tests.support.otlp_collector import Collector, GotSpan, running_collector
from tests.support.servers import Server, running_server, stream_json, wait_for

MESSAGES = [{"role": "user", "content": "A secret of the harbour"}]
CHAT = "/v1/chat/completions"
SERVER_KIND, INTERNAL_KIND = 2, 1
ERROR = 2


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def server(
    tiny_flags: tuple[str, ...], tiny_spec: ModelSpec, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("traced")
    flags = ("--otlp-endpoint", collector.url, "--log-format", "json", "--max-queue-size", "8", "--max-batch-size", "4")
    soon = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_METRIC_EXPORT_INTERVAL": "200", "OTEL_EXPORTER_OTLP_TIMEOUT": "3600"}
    with running_server(
        directory, *tiny_flags, *flags, env={**soon, "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    ) as server:
        path = save_prompt(make_soft_prompt("kv", 33, tiny_spec, scale=0.5), directory, "manual")
        assert server.upload("manual", path).status_code == 201
        yield server


def parent_of(sampled: bool = True) -> tuple[str, str, dict[str, str]]:
    """A caller's trace and span, and the header that tells of them."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, {"traceparent": f"00-{trace_id}-{span_id}-0{int(sampled)}"}


def whole_trace(collector: Collector, trace_id: str) -> dict[str, GotSpan]:
    """By name, once the request's own span is there, which is the last to be ended."""

    def found() -> list[GotSpan]:
        spans = collector.trace(trace_id)
        return spans if any(span.kind == SERVER_KIND for span in spans) else []

    return {span.name: span for span in wait_for(found, "no trace has come")}


def test_a_streamed_chat_with_a_soft_prompt(server: Server, collector: Collector) -> None:
    trace_id, span_id, headers = parent_of()
    body = {"model": "manual", "messages": MESSAGES, "max_tokens": 12, "temperature": 0.5, "stream": True}
    began = time.time()
    server.http.headers.update(headers)
    try:
        events = stream_json(server, CHAT, {**body, "ignore_eos": True})
    finally:
        del server.http.headers["traceparent"]
    took = time.time() - began
    spans = whole_trace(collector, trace_id)
    known = time.time()

    assert set(spans) == {"chat manual", "prepare", "queue", "soft prompt load", "prefill", "decode"}
    request = spans["chat manual"]
    assert (request.kind, request.parent_id, request.status) == (SERVER_KIND, span_id, 0)
    assert all(span.parent_id == request.span_id for span in spans.values() if span is not request)

    process = {name: span.resource["softbatch.process"] for name, span in spans.items()}
    assert (process["chat manual"], process["prepare"]) == ("server", "server")
    assert {process[name] for name in ("queue", "soft prompt load", "prefill", "decode")} == {"engine"}
    assert request.resource["process.pid"] == server.process.pid
    assert spans["decode"].resource["process.pid"] == server.engine().pid
    for span in spans.values():
        assert span.resource["service.name"] == "softbatch"
        assert span.resource["deployment.environment.name"] == "test", "the environment counts"

    assert began - 0.1 <= request.start <= spans["queue"].start
    assert request.end <= known + 0.1  # it ends behind what the client has read last
    assert spans["queue"].start <= spans["soft prompt load"].start < spans["soft prompt load"].end
    assert spans["soft prompt load"].end <= spans["queue"].end + 0.001
    assert spans["queue"].end == spans["prefill"].start
    assert spans["prefill"].end == spans["decode"].start < spans["decode"].end <= request.end

    found = request.attributes
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == "softbatch"
    assert found["gen_ai.request.model"] == "manual"
    assert found["gen_ai.response.model"] == "tiny-llama"
    assert found["gen_ai.response.id"] == events[0]["id"]
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.temperature"]) == (12, 0.5)
    assert found["gen_ai.request.stream"] is True
    assert found["gen_ai.usage.output_tokens"] == 12
    assert found["gen_ai.usage.input_tokens"] > 33
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < found["gen_ai.response.time_to_first_chunk"] < took
    assert found["softbatch.soft_prompt.name"] == "manual"
    assert found["softbatch.soft_prompt.virtual_tokens"] == 33
    assert (found["http.route"], found["http.response.status_code"]) == (CHAT, 200)
    assert (found["server.address"], found["server.port"]) == ("127.0.0.1", server.port)
    assert spans["decode"].attributes["softbatch.output_tokens"] == 12
    assert not any("secret" in str(span) for span in spans.values()), "no text of prompts"


def test_no_load_of_what_is_resident_and_a_span_for_each_choice(server: Server, collector: Collector) -> None:
    trace_id, _, headers = parent_of()
    body = {"model": "manual", "messages": MESSAGES, "max_tokens": 3, "n": 3, "ignore_eos": True}
    for _ in range(2):
        assert server.http.post(CHAT, json=body, headers=headers).status_code == 200
    wait_for(lambda: len([s for s in collector.trace(trace_id) if s.kind == SERVER_KIND]) == 2, "not both have come")
    [_, request] = [span for span in collector.trace(trace_id) if span.kind == SERVER_KIND]
    second = [span for span in collector.trace(trace_id) if span.parent_id == request.span_id]
    assert "soft prompt load" not in {span.name for span in second}
    assert sorted(s.attributes["softbatch.choice"] for s in second if s.name == "decode") == [0, 1, 2]
    assert request.attributes["gen_ai.request.choice.count"] == 3
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"] * 3
    assert request.attributes["gen_ai.usage.output_tokens"] == 9


def test_who_is_not_sampled_is_not_traced(server: Server, collector: Collector) -> None:
    unsampled, _, headers = parent_of(sampled=False)
    later, _, other = parent_of()
    for given in (headers, other):
        server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=given)
    whole_trace(collector, later)
    assert not collector.trace(unsampled)


@pytest.mark.parametrize("given", ["", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff-junk", "00-xyz", "é"])
def test_a_broken_parent_begins_a_trace_of_its_own(server: Server, collector: Collector, given: str) -> None:
    ask = secrets.token_hex(8)
    headers = {"traceparent": given.encode("latin-1"), "X-Request-Id": ask}
    assert server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers).is_success
    [span] = wait_for(
        lambda: [s for s in collector.spans if s.attributes.get("softbatch.request_id") == ask], "no span"
    )
    assert span.parent_id == ""


def test_refusals_are_errors_of_the_client(server: Server, collector: Collector) -> None:
    trace_id, _, headers = parent_of()
    body = {"model": "nobody", "messages": MESSAGES}
    assert server.http.post(CHAT, json=body, headers=headers).status_code == 404
    [span] = whole_trace(collector, trace_id).values()
    assert (span.name, span.status) == (f"POST {CHAT}", 0)
    assert span.attributes["error.type"] == "model_not_found"
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["gen_ai.request.model"] == "nobody"
    assert span.attributes["http.response.status_code"] == 404


def test_a_deadline_sets_the_status_in_a_stream_too(server: Server, collector: Collector) -> None:
    for stream in (False, True):
        trace_id, _, headers = parent_of()
        body = {"prompt": [5] * 9000, "max_tokens": 8, "timeout_ms": 1, "stream": stream}
        server.http.post("/v1/completions", json=body, headers=headers)
        spans = whole_trace(collector, trace_id)
        [request] = [span for span in spans.values() if span.kind == SERVER_KIND]
        assert (request.status, request.attributes["error.type"]) == (ERROR, "deadline_exceeded"), stream
        assert "decode" not in spans


def test_the_other_operations_have_their_names(server: Server, collector: Collector) -> None:
    continued = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
    asked = [
        ("text_completion tiny-llama", "/generate", continued),
        ("text_completion tiny-llama", "/invocations", continued),
        ("embeddings tiny-llama", "/v1/embeddings", {"input": ["a", "b"]}),
        ("score tiny-llama", "/v1/score", {"input": "x", "candidates": ["y", "z"]}),
    ]
    for name, path, body in asked:
        trace_id, _, headers = parent_of()
        reply = server.http.post(path, json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        spans = whole_trace(collector, trace_id)
        assert name in spans
        assert "prefill" in spans
        assert spans[name].attributes["gen_ai.usage.input_tokens"] > 0


def test_watchers_are_not_traced(server: Server, collector: Collector) -> None:
    headers = parent_of()[2]
    for path in ("/health/ready", "/metrics", "/v1/queue", "/docs"):
        server.http.get(path, headers=headers)
    trace_id, _, headers = parent_of()
    server.http.get("/v1/models", headers=headers)
    assert "GET /v1/models" in whole_trace(collector, trace_id)
    assert not {s.attributes.get("url.path") for s in collector.spans} & {
        "/health/ready",
        "/metrics",
        "/v1/queue",
        "/docs",
    }


def test_metrics_have_the_conventions_names(server: Server, collector: Collector) -> None:
    server.post(CHAT, {"messages": MESSAGES, "max_tokens": 5, "ignore_eos": True})

    def arrived() -> bool:
        points = collector.points.get("gen_ai.server.request.duration", ())
        return any(labels.get("gen_ai.request.model") == "tiny-llama" for labels, _ in points)

    wait_for(arrived, "no metrics have come")
    names = {"server.time_to_first_token", "server.time_per_output_token", "client.token.usage"}
    assert {f"gen_ai.{name}" for name in names} <= set(collector.points)
    for labels, point in collector.points["gen_ai.client.token.usage"]:
        assert labels["gen_ai.provider.name"] == "softbatch"
        assert labels["gen_ai.token.type"] in ("input", "output")
        assert labels["gen_ai.operation.name"] in ("chat", "text_completion", "embeddings", "score")
        assert point.count > 0
    models = {labels.get("gen_ai.request.model") for _, points in collector.points.items() for labels, _ in points}
    assert "nobody" not in models, "clients do not make new series"


def test_the_log_has_both_ids(server: Server) -> None:
    trace_id, _, headers = parent_of()
    server.http.get("/v1/models", headers={**headers, "X-Request-Id": "mine-7"})
    text = wait_for(lambda: '"mine-7"' in (log := server.log.read_text()) and log, "the request is not logged")
    lines = [json.loads(line) for line in text.splitlines() if '"mine-7"' in line]
    assert [(line["trace_id"], line["message"]) for line in lines] == [(trace_id, "GET /v1/models")]


def test_a_collector_that_does_not_answer_holds_nobody_up(server: Server, collector: Collector) -> None:
    collector.may_answer.clear()
    try:
        seen = collector.requests
        for _ in range(3):  # whoever waited for the collector would wait for an hour
            assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
            wait_for(lambda: collector.requests > seen, "nothing was sent")
    finally:
        collector.may_answer.set()


def test_a_dead_collector_is_told_once(server: Server, collector: Collector) -> None:
    def said(what: str) -> int:
        return sum(what in line for line in Path(server.log).read_text().splitlines())

    collector.status = 400
    try:
        for _ in range(4):
            seen = collector.requests
            server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
            wait_for(lambda seen=seen: collector.requests > seen, "nothing was sent")  # type: ignore[misc]
        wait_for(lambda: said("does not take traces"), "nothing was said")
    finally:
        collector.status = 200
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    wait_for(lambda: said("takes traces again"), "it was not said that it is back")
    assert said("does not take traces") == 1
    assert said("Failed to export spans") == 1, "the reason, in the same line"
