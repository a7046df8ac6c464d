"""Requests as people and browsers send them, through the middlewares of the real app, without an engine."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from softbatch.server.app import add_middlewares
from softbatch.server.http.body_limit import MAX_JSON_BYTES
from softbatch.server.http.errors import ApiError, install_handlers
from softbatch.server.settings import Settings

KEY = {"Authorization": "Bearer right"}


class Body(BaseModel):
    text: str
    model: str | None = None
    n: float = 0
    echo: bool = False


def client_of(**settings: Any) -> TestClient:
    app = FastAPI()
    install_handlers(app)

    @app.get("/v1/models")
    def models() -> list[str]:
        return ["m"]

    @app.get("/forever")
    def forever() -> Response:
        async def events() -> AsyncIterator[bytes]:
            while True:
                yield b"data: x\n\n"

        return StreamingResponse(events())

    @app.post("/v1/chat/completions")
    @app.post("/generate")
    def chat(body: Body) -> Any:
        return body.model_dump() if body.echo else len(body.text)

    @app.get("/broken")
    def broken(request: Request) -> None:
        raise ZeroDivisionError

    @app.get("/busy")
    @app.get("/generate")
    def busy() -> None:
        raise ApiError(503, "not now")

    add_middlewares(app, Settings(**settings))
    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


@pytest.fixture
def client() -> TestClient:
    return client_of()


class TestHeadAndSlashes:
    def test_head_is_get_without_a_body(self, client: TestClient) -> None:
        whole = client.get("/v1/models")
        head = client.head("/v1/models")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))
        assert client.head("/nowhere").status_code == 404
        assert client.head("/v1/chat/completions").status_code == 405
        assert client.head("/forever").status_code == 200, "a stream without an end"

    @pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1//models", "/v1/models//"])
    def test_a_slash_too_many(self, path: str) -> None:
        client = client_of(api_key=("right",))
        assert client.get(f"http://testserver{path}").status_code == 401
        assert client.get(f"http://testserver{path}", headers=KEY).json() == ["m"]

    def test_azures_paths(self) -> None:
        client = client_of(api_key=("right",))
        for base in ("/openai/deployments/smollm2-135m", "/openai/v1", "//openai/deployments/a.b-c/"):
            reply = client.post(
                f"http://testserver{base}/chat/completions?api-version=2024-10-21",
                json={"text": "abc"},
                headers={"api-key": "right"},
            )
            assert reply.json() == 3
            assert client.get(f"http://testserver{base}/models").status_code == 401
        for path in (
            "/openai/deployments/a/forever",
            "/openai/v1/forever",
            "/openai/deployments/a/b/models",
            "/openai/models",
        ):
            assert client.get(path, headers=KEY).status_code == 404

    def test_azures_deployment_is_the_model(self, client: TestClient) -> None:
        path = "/openai/deployments/policy/chat/completions"
        for named in ({}, {"model": None}, {"model": ""}, {"model": "tgi"}, {"model": "policy"}):
            told = client.post(path, json={"text": "é\n", "echo": True, "n": 1.50, **named}).json()
            assert told == {"text": "é\n", "echo": True, "n": 1.5, "model": "policy"}
        refused = client.post(path, json={"text": "a", "model": "manual"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "model"
        assert "'manual'" in refused.json()["error"]["message"]
        assert "'policy'" in refused.json()["error"]["message"]
        for body in (b"", b"{", b"[]", b'{"text": 3}'):
            assert client.post(path, content=body).status_code == 400, "what the route says"
        assert client.post("/openai/v1/chat/completions", json={"text": "a", "echo": True}).json()["model"] is None
        squeezed = gzip.compress(b'{"text": "a", "echo": true}')
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        told = client.post(path, content=squeezed, headers=headers).json()
        assert told["model"] == "policy"

    def test_a_body_is_not_lost_on_the_way(self, client: TestClient) -> None:
        assert client.post("http://testserver//v1/chat/completions/", json={"text": "abc"}).json() == 3


class TestOrigins:
    def test_a_browser_may_ask_without_a_key(self) -> None:
        client = client_of(api_key=("right",), allow_origin=("https://app.example.com",))
        asks = {
            "Origin": "https://app.example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        preflight = client.options("/v1/chat/completions", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for path, status in (("/v1/models", 401), ("/broken", 401)):
            refused = client.get(path, headers={"Origin": "https://app.example.com"})
            assert refused.status_code == status
            assert refused.headers["access-control-allow-origin"] == "https://app.example.com", "the page sees why"
        broken = client.get("/broken", headers={"Origin": "https://app.example.com", **KEY})
        assert broken.status_code == 500
        assert broken.headers["access-control-allow-origin"] == "https://app.example.com"
        other = client.options("/v1/chat/completions", headers=asks | {"Origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in other.headers

    def test_none_is_allowed_unless_asked_for(self, client: TestClient) -> None:
        reply = client.get("/v1/models", headers={"Origin": "https://app.example.com"})
        assert not [name for name in reply.headers if name.startswith("access-control")]

    @pytest.mark.parametrize("origin", ["app.example.com", "https://app.example.com/page", "https://a b"])
    def test_what_is_no_origin(self, origin: str) -> None:
        with pytest.raises(ValueError, match="is no origin"):
            Settings(allow_origin=(origin,))


class TestRequestIds:
    @pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/broken", "/busy"])
    def test_it_comes_back(self, client: TestClient, path: str) -> None:
        assert client.get(path, headers={"X-Request-Id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
        made_up = {client.get(path).headers["x-request-id"] for _ in range(2)}
        assert len(made_up) == 2

    @pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "ä", "a\tb", '"quoted"'])
    def test_another_one_for_what_is_no_id(self, client: TestClient, sent: str) -> None:
        found = client.get("/v1/models", headers={"X-Request-Id": sent.encode("latin-1")}).headers["x-request-id"]
        assert found != sent
        assert len(found) == 32

    def test_the_log_has_it(self, client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        reply = client.get("/broken", headers={"X-Request-Id": "mine"})
        assert "internal error mine" in reply.json()["error"]["message"]
        assert any("internal error mine" in record.message and record.exc_info for record in caplog.records)
        caplog.clear()
        client.get("/v1/models", headers={"X-Request-Id": "mine"})
        (line,) = [record for record in caplog.records if record.name.endswith("request_log")]
        assert line.message == "GET /v1/models"
        assert line.__dict__["fields"]["id"] == "mine"


class TestCompressedBodies:
    JSON = json.dumps({"text": "hello"}).encode()

    def post(self, client: TestClient, body: bytes, encoding: str) -> Any:
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        return client.post("/v1/chat/completions", content=body, headers=headers)

    @pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
    def test_gzip_is_read(self, client: TestClient, encoding: str) -> None:
        assert self.post(client, gzip.compress(self.JSON), encoding).json() == 5
        assert self.post(client, self.JSON, "identity").json() == 5

    def test_a_body_that_grows_too_large(self, client: TestClient) -> None:
        reply = self.post(client, gzip.compress(b" " * (MAX_JSON_BYTES + 1)), "gzip")
        assert reply.status_code == 413
        assert "no longer compressed" in reply.json()["error"]["message"]
        fits = gzip.compress(self.JSON + b" " * (MAX_JSON_BYTES - len(self.JSON)))
        assert self.post(client, fits, "gzip").json() == 5

    @pytest.mark.parametrize(
        "body",
        [b"", b"{}", gzip.compress(JSON, mtime=0)[:-9], zlib.compress(JSON), gzip.compress(JSON, mtime=0) + b"more"],
    )
    def test_what_is_no_gzip(self, client: TestClient, body: bytes) -> None:
        reply = self.post(client, body, "gzip")
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "invalid_encoding"

    @pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
    def test_other_encodings(self, client: TestClient, encoding: str) -> None:
        reply = self.post(client, self.JSON, encoding)
        assert reply.status_code == 415
        assert reply.headers["accept-encoding"] == "gzip"
        assert "gzip" in reply.json()["error"]["message"]


def test_errors_as_text_generation_inference_has_them() -> None:
    client = client_of(api_key=("right",))
    refused = client.post("/generate", json={"text": "x"})
    assert refused.json() == {
        "error": refused.json()["error"],
        "error_type": "authentication",
        "param": None,
        "code": "invalid_api_key",
    }
    invalid = client.post("/generate", json={}, headers=KEY).json()
    assert (invalid["error_type"], invalid["param"]) == ("validation", "text")
    busy = client.get("/generate/", headers=KEY).json()
    assert (busy["error"], busy["error_type"]) == ("not now", "overloaded")
    assert client.get("/busy", headers=KEY).json()["error"]["message"] == "not now"


def test_a_wrong_method_is_told_all_that_are_right(client: TestClient) -> None:
    """Those of every route with the path, not of the first one alone."""
    reply = client.put("/generate", json={})
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, POST")
    assert "allowed: GET, POST" in reply.json()["error"]
