"""The log line of a request and its id, on an app without an engine; and what the lines look like."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import StreamingResponse

from softbatch.scheduler.engine.logs import JsonLines, TextLines
from softbatch.server.http.errors import install_handlers
from softbatch.server.http.request_log import RequestLogMiddleware
from softbatch.server.observability.request_record import note_start

LOGGER = "softbatch.server.http.request_log"


@pytest.fixture
def client(caplog: pytest.LogCaptureFixture) -> TestClient:
    caplog.set_level(logging.INFO, logger=LOGGER)
    app = FastAPI()
    install_handlers(app)

    @app.get("/health/ready")
    @app.get("/plain")
    async def plain() -> str:
        return "fine"

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        prompt = [1, 2, 3]
        choices = [SimpleNamespace(token_ids=prompt, prompt_tokens=3, virtual_tokens=2, generated=0) for _ in range(2)]
        for choice in choices:
            note_start(choice)

        async def events():  # type: ignore[no-untyped-def]
            for choice in choices:
                choice.generated += 4
                yield b"x"

        return StreamingResponse(events())

    app.add_middleware(RequestLogMiddleware)
    return TestClient(app, raise_server_exceptions=False)


def fields_of(caplog: pytest.LogCaptureFixture) -> dict[str, object]:
    [record] = [record for record in caplog.records if record.name == LOGGER]
    return {"message": record.getMessage(), **record.fields}  # type: ignore[attr-defined]


def test_a_line_for_each_request(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    reply = client.get("/plain?secret=1")
    fields = fields_of(caplog)
    assert fields["message"] == "GET /plain"
    assert (fields["status"], fields["id"]) == (200, reply.headers["x-request-id"])
    assert "prompt_tokens" not in fields


def test_tokens_are_counted_to_the_end_of_a_stream(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.get("/stream")
    fields = fields_of(caplog)
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (5, 8)


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/broken", 500)])
def test_errors_have_a_line_too(client: TestClient, caplog: pytest.LogCaptureFixture, path: str, status: int) -> None:
    client.get(path)
    assert fields_of(caplog)["status"] == status


def test_probes_have_none(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    assert client.get("/health/ready").headers["x-request-id"]
    assert not [record for record in caplog.records if record.name == LOGGER]


def test_the_clients_own_id_is_kept(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    assert client.get("/plain", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert fields_of(caplog)["id"] == "abc-1"


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "é", "a\tb"])
def test_one_that_could_spoil_the_log_is_not(client: TestClient, given: str) -> None:
    answered = client.get("/plain", headers={"X-Request-Id": given.encode("latin-1")}).headers["x-request-id"]
    assert answered != given
    assert len(answered) == 32


def test_paths_cannot_begin_a_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.get("/a%0aERROR%20forged" + "x" * 500)
    message = str(fields_of(caplog)["message"])
    assert "\n" not in message
    assert len(message) < 300


class TestLines:
    @pytest.fixture
    def record(self) -> logging.LogRecord:
        try:
            raise ValueError("at fault")
        except ValueError as error:
            found = logging.LogRecord("x.y", logging.ERROR, "", 1, "GET %s", ("/a",), (ValueError, error, None))
        found.fields = {"id": "7", "status": 500}
        return found

    def test_json_is_one_object_a_line(self, record: logging.LogRecord) -> None:
        line = JsonLines("engine").format(record)
        assert "\n" not in line
        parsed = json.loads(line)
        assert (parsed["level"], parsed["process"], parsed["message"]) == ("error", "engine", "GET /a")
        assert (parsed["id"], parsed["status"]) == ("7", 500)
        assert "at fault" in parsed["exception"]
        assert parsed["time"].endswith("Z")

    def test_text_has_the_fields_behind_the_message(self, record: logging.LogRecord) -> None:
        first = TextLines().format(record).splitlines()[0]
        assert first.endswith("ERROR GET /a id=7 status=500")
