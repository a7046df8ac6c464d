"""API keys, body limits and the one shape of errors, on an app without an engine."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel

from softbatch.prompt_store.stores.bucket import BucketDenied, BucketError
from softbatch.server import request_failures
from softbatch.server.http.auth import AuthMiddleware
from softbatch.server.http.body_limit import MIB, BodyLimitMiddleware
from softbatch.server.http.errors import (
    STATUS,
    ApiError,
    as_api_error,
    error_json,
    install_handlers,
    invalid,
    unavailable,
    unknown_model,
)
from softbatch.server.request_failures import Failure, UnknownSoftPrompt, shown

KEYS = ("first-key", "zweiter-schlüssel")
LIMIT = 1000
CHUNK = 100


class Body(BaseModel):
    text: str


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    install_handlers(app)

    @app.get("/health")
    @app.get("/health/live")
    @app.get("/healthy")
    @app.get("/v1/models")
    def fine() -> str:
        return "fine"

    parts = APIRouter(prefix="/v1/parts")
    parts.add_api_route("/{name}", fine, methods=["POST"])
    app.include_router(parts)

    @app.post("/parsed")
    def parsed(body: Body) -> int:
        return len(body.text)

    @app.post("/raw")
    @app.post("/v1/soft_prompts")
    async def raw(request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    @app.get("/broken")
    def broken() -> None:
        raise ZeroDivisionError("secret detail at /some/path")

    @app.get("/busy")
    def busy() -> None:
        raise ApiError(429, "the queue is full", headers={"Retry-After": "7"})

    return app


async def stream(app: Any, path: str, num_chunks: int, announced: str | None) -> tuple[int, bytes, int]:
    """POST a body chunk by chunk; returns status, reply and how many chunks the app has taken."""
    headers = [(b"content-type", b"application/json")]
    if announced is not None:
        headers.append((b"content-length", announced.encode()))
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("testserver", 80),
        "client": ("127.0.0.1", 1),
    }
    taken = 0
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * CHUNK, "more_body": taken < num_chunks}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), taken


def client_of(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [(BucketError, "store_unreachable", "5"), (BucketDenied, "store_denied", None)],
)
def test_a_bucket_that_fails_is_no_fault_of_the_server(
    app: FastAPI, error: type[BucketError | BucketDenied], code: str, retry_after: str | None
) -> None:
    @app.get("/bucket")
    def bucket() -> None:
        raise error("s3://bucket/prompts/a.json does not answer")

    reply = client_of(app).get("/bucket")
    assert error_of(reply, 503)["code"] == code
    assert "prompts/a.json" in reply.text
    assert reply.headers.get("retry-after") == retry_after


def error_of(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


class TestAuth:
    @pytest.fixture
    def client(self, app: FastAPI) -> TestClient:
        app.add_middleware(AuthMiddleware, api_keys=KEYS)
        return client_of(app)

    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_each_key_opens(self, client: TestClient, key: str, scheme: str) -> None:
        headers = {"authorization": f"{scheme} {key}".encode()}
        assert client.get("/v1/models", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "authorization",
        [
            None,
            "",
            "Bearer",
            "Bearer ",
            "first-key",
            "Basic first-key",
            "Bearer first-ke",
            "Bearer first-key x",
        ],
    )
    def test_anything_else_is_refused(self, client: TestClient, authorization: str | None) -> None:
        headers = {"authorization": authorization} if authorization is not None else {}
        reply = client.get("/v1/models", headers=headers)
        error = error_of(reply, 401)
        assert error["type"] == "authentication_error"
        assert error["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("authorization", [{}, {"authorization": "Bearer of-another-server"}])
    @pytest.mark.parametrize("name", ["x-api-key", "api-key"])
    def test_anthropics_and_azures_clients_send_it_in_a_header_of_its_own(
        self, client: TestClient, authorization: dict[str, str], name: str
    ) -> None:
        headers = {name: KEYS[1].encode(), **authorization}
        assert client.get("/v1/messages", headers=headers).status_code == 404  # let in, to no route
        assert client.get("/v1/messages", headers={"authorization": f"Bearer {KEYS[0]}"}).status_code == 404
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            reply = client.get(path, headers={name: "wrong", **authorization})
            assert reply.status_code == 401
            error = reply.json()
            assert (error["type"], error["error"]["type"]) == ("error", "authentication_error")
            assert "x-api-key" in error["error"]["message"]
        assert client.get("/v1/models", headers=headers).status_code == 200, "Anthropic's clients list models too"
        error_of(client.get("/v1/models", headers={name: "wrong", **authorization}), 401)

    @pytest.mark.parametrize("name", ["x-api-key", "api-key"])
    def test_a_gateways_key_does_not_take_the_place_of_an_admins(self, app: FastAPI, name: str) -> None:
        app.add_middleware(AuthMiddleware, api_keys=["plain"], admin_keys=["admin"])
        client, admin = client_of(app), {"authorization": "Bearer admin"}
        assert client.post("/v1/compressions", headers=admin | {name: "plain"}).status_code == 404, "let in"
        plain = client.post("/v1/compressions", headers={"authorization": "Bearer plain", name: "admin"})
        assert error_of(plain, 403)["code"] == "admin_key_needed"

    @pytest.mark.parametrize("path", ["/health", "/health/live"])
    def test_probes_need_no_key(self, client: TestClient, path: str) -> None:
        assert client.get(path).status_code == 200

    @pytest.mark.parametrize(
        "path",
        [
            "/healthy",
            "/health%2e",
            "/docs/",
            "/docs/assets",
            "/docs/assetsx",
            "/openapi.json/",
            "/nowhere",
            "http://testserver//health",
            "/v1/models/",
        ],
    )
    def test_everything_else_does(self, client: TestClient, path: str) -> None:
        error_of(client.get(path), 401)

    @pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/assets/swagger-ui.css", "/"])
    def test_only_reading_the_documentation_needs_none(self, client: TestClient, path: str) -> None:
        assert client.get(path).status_code != 401
        assert client.head(path).status_code != 401
        assert client.post(path).status_code == 401

    def test_the_host_header_opens_nothing(self, client: TestClient) -> None:
        for host in ("testserver/health?", "testserver/health/", "health"):
            error_of(client.get("/v1/models", headers={"host": host}), 401)

    def test_off_without_keys(self, app: FastAPI) -> None:
        app.add_middleware(AuthMiddleware, api_keys=())
        assert client_of(app).get("/v1/models").status_code == 200


class TestAdmins:
    @pytest.fixture
    def client(self, app: FastAPI) -> TestClient:
        app.add_middleware(AuthMiddleware, api_keys=("user",), admin_keys=("root",))
        return client_of(app)

    def status(self, client: TestClient, key: str, method: str, path: str) -> int:
        status: int = client.request(method, path, headers={"authorization": f"Bearer {key}"}).status_code
        return status

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/v1/soft_prompts"),
            ("POST", "/v1/soft_prompts/"),
            ("DELETE", "/v1/soft_prompts/manual"),
            ("PUT", "/v1/soft_prompts/manual"),
            ("GET", "/v1/compressions"),
            ("POST", "/v1/compressions"),
            ("GET", "/v1/compressions/x/report"),
        ],
    )
    def test_only_they_change_what_all_share(self, client: TestClient, method: str, path: str) -> None:
        reply = client.request(method, path, headers={"authorization": "Bearer user"})
        assert error_of(reply, 403)["code"] == "admin_key_needed"
        assert self.status(client, "root", method, path) not in (401, 403)
        assert self.status(client, "nobody", method, path) == 401

    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/v1/models"), ("POST", "/parsed"), ("GET", "/v1/soft_prompts/manual")]
    )
    def test_the_others_may_use_it(self, client: TestClient, method: str, path: str) -> None:
        assert self.status(client, "user", method, path) not in (401, 403)


class TestBodyLimit:
    @pytest.fixture
    def client(self, app: FastAPI) -> TestClient:
        app.add_middleware(BodyLimitMiddleware, max_upload_bytes=2 * LIMIT, max_json_bytes=LIMIT)
        return client_of(app)

    def test_up_to_the_limit(self, client: TestClient) -> None:
        assert client.post("/raw", content=b"x" * LIMIT).json() == LIMIT
        assert client.post("/parsed", json={"text": "x" * 900}).json() == 900

    @pytest.mark.parametrize("path", ["/raw", "/parsed", "/nowhere"])
    def test_announced_too_large(self, client: TestClient, path: str) -> None:
        error = error_of(client.post(path, content=b"x" * (LIMIT + 1)), 413)
        assert error["type"] == "invalid_request_error"
        assert "larger than" in error["message"]

    def test_refused_before_it_is_read(self, client: TestClient) -> None:
        status, _, chunks_read = asyncio.run(stream(client.app, "/raw", 10_000, str(LIMIT + 1)))
        assert (status, chunks_read) == (413, 0)

    @pytest.mark.parametrize("path", ["/raw", "/parsed"])
    @pytest.mark.parametrize("announced", [None, "10", "-5", "x"])
    def test_counted_while_it_streams(self, client: TestClient, path: str, announced: str | None) -> None:
        status, body, chunks_read = asyncio.run(stream(client.app, path, 10_000, announced))
        assert status == 413
        assert b"larger than" in body
        assert chunks_read == LIMIT // CHUNK + 1

    def test_uploads_have_their_own_limit(self, client: TestClient) -> None:
        largest = 2 * LIMIT + MIB
        assert client.post("/v1/soft_prompts", content=b"x" * largest).json() == largest
        error_of(client.post("/v1/soft_prompts", content=b"x" * (largest + 1)), 413)

    def test_an_error_of_the_app_stays_what_it_is(self, client: TestClient) -> None:
        error_of(client.get("/broken"), 500)
        error_of(client.get("/nowhere"), 404)


class TestErrors:
    @pytest.fixture
    def client(self, app: FastAPI) -> TestClient:
        return client_of(app)

    def test_unknown_route(self, client: TestClient) -> None:
        error = error_of(client.get("/v1/nowhere"), 404)
        assert "'/v1/nowhere'" in error["message"]
        assert error["type"] == "invalid_request_error"

    def test_a_route_that_was_meant_is_named(self, client: TestClient) -> None:
        """A base URL without its version, or with two, and another server's routes."""
        for path, found in (
            ("/models", "/v1/models"),
            ("/v1/v1/models", "/v1/models"),
            ("/api/v2/parts/one", "/v1/parts/one"),
            ("/api/chat", "/v1/chat/completions"),
            ("/api/tags", "/v1/models"),
        ):
            assert f"did you mean {found}?" in error_of(client.get(path), 404)["message"]

    def test_long_and_strange_paths_are_clipped(self, client: TestClient) -> None:
        error = error_of(client.get("/" + "x" * 5000 + "%00%0a"), 404)
        assert len(error["message"]) < 300

    def test_wrong_method(self, client: TestClient) -> None:
        reply = client.get("/parsed")
        error = error_of(reply, 405)
        assert reply.headers["allow"] == "POST"
        assert "allowed: POST" in error["message"]

    def test_headers_of_an_error_are_sent(self, client: TestClient) -> None:
        reply = client.get("/busy")
        error = error_of(reply, 429)
        assert reply.headers["retry-after"] == "7"
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")

    def test_a_bug_shows_nothing_but_an_id_that_the_log_has_too(
        self, client: TestClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.ERROR, logger="softbatch.server.http.errors"):
            reply = client.get("/broken")
        error = error_of(reply, 500)
        assert error["type"] == "server_error"
        assert "secret" not in reply.text
        assert "ZeroDivision" not in reply.text
        [record] = [record for record in caplog.records if record.name == "softbatch.server.http.errors"]
        request_id = error["message"].split()[2].rstrip(";")
        assert len(request_id) == 16
        assert request_id in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[0] is ZeroDivisionError

    @pytest.mark.parametrize(
        ("error", "status", "kind", "code"),
        [
            (invalid("n", "too many"), 400, "invalid_request_error", None),
            (unknown_model("x"), 404, "invalid_request_error", "model_not_found"),
            (as_api_error(UnknownSoftPrompt("x")), 404, "invalid_request_error", "soft_prompt_not_found"),
            (unavailable("later"), 503, "server_error", "unavailable"),
            (ApiError(409, "taken"), 409, "invalid_request_error", None),
            (ApiError(422, "wrong"), 422, "invalid_request_error", None),
        ],
    )
    def test_types_and_codes(self, error: ApiError, status: int, kind: str, code: str | None) -> None:
        assert (error.status, error.type, error.code) == (status, kind, code)

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, "invalid_request_error"),
            (403, "permission_error"),
            (404, "not_found_error"),
            (409, "invalid_request_error"),
            (413, "request_too_large"),
            (429, "rate_limit_error"),
            (500, "api_error"),
            (503, "overloaded_error"),
            (504, "timeout_error"),
        ],
    )
    def test_anthropics_types(self, status: int, kind: str) -> None:
        error = json.loads(error_json(ApiError(status, "m", param="p", code="c"), "/v1/messages"))
        assert error == {"type": "error", "error": {"type": kind, "message": "m", "param": "p", "code": "c"}}

    def test_every_failure_has_a_status(self) -> None:
        kinds = [
            kind for kind in vars(request_failures).values() if isinstance(kind, type) and issubclass(kind, Failure)
        ]
        assert set(kinds) - {Failure} == set(STATUS)

    def test_messages_are_bounded_and_printable(self) -> None:
        assert len(error_json(ApiError(400, "x" * 10_000), "/x")) < 1200
        assert error_json(ApiError(400, "\ud800"), "/x").isascii()
        assert shown("a\nb\ud800" + "c" * 200) == "'a\ufffdb\ufffd" + "c" * 76 + "…'"
