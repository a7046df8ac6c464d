"""`/docs` on an app without an engine: it works without the internet, with and without a key."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi.testclient import TestClient

from softbatch.server.app import create_app
from softbatch.server.services import Services
from softbatch.server.settings import Settings


def client_with(*keys: str) -> TestClient:
    services = SimpleNamespace(tracing=None, settings=Settings.model_construct(api_key=keys))
    return TestClient(create_app(cast(Services, services)))


@pytest.mark.parametrize("keys", [(), ("key",)], ids=["open", "with a key"])
def test_every_file_comes_from_this_server(keys: tuple[str, ...]) -> None:
    client = client_with(*keys)
    page = client.get("/docs")
    assert page.status_code == 200
    named = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
    [document] = re.findall(r"""url: ["']([^"']+)["']""", page.text)
    assert len(named) == 3
    for path in [*named, document]:
        assert path.startswith("/"), path
        assert client.get(path).status_code == 200, path
    assert "://" not in page.text
    assert '"validatorUrl": null' in page.text


def test_the_root_leads_there() -> None:
    assert client_with("key").get("/").url.path == "/docs"


def test_the_page_asks_for_a_key_where_one_is_needed() -> None:
    assert client_with("key").get("/openapi.json").json()["security"] == [{"key": []}]
    assert "security" not in client_with().get("/openapi.json").json()


def test_a_stream_is_no_string_in_the_document_and_its_events_have_a_shape() -> None:
    paths = client_with().get("/openapi.json").json()["paths"]
    replies = [reply for path in paths.values() for one in path.values() for reply in one["responses"].values()]
    contents = [reply.get("content", {}) for reply in replies]
    streams = [content["text/event-stream"] for content in contents if "text/event-stream" in content]
    assert len(streams) >= 9
    assert all("type" not in stream["schema"] for stream in streams)
    bodies = client_with().get("/openapi.json").json()["components"]["schemas"]
    for path, routes in paths.items():
        content = routes.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        fields = bodies.get(content.get("schema", {}).get("$ref", "").rpartition("/")[2], {}).get("properties", {})
        assert "stream" not in fields or "text/event-stream" in routes["post"]["responses"]["200"]["content"], path
    events = paths["/v1/compressions/{id}/events"]["get"]["responses"]
    assert set(events["200"]["content"]) == {"text/event-stream"}
    shape = events["200"]["content"]["text/event-stream"]["schema"]["contentSchema"]
    assert shape == {"$ref": "#/components/schemas/CompressionJob"}
    assert set(events["4XX"]["content"]) == {"application/json"}


def test_the_document_is_the_same_each_time() -> None:
    client = client_with("key")
    first = client.get("/openapi.json").json()
    assert "contentSchema" in str(first)
    assert client.get("/openapi.json").json() == first


def test_nothing_else_of_the_folder_is_given_away() -> None:
    client = client_with()
    assert client.get("/docs/assets/../docs_page.py").status_code == 404
    assert client.get("/docs/assets/%2e%2e/docs_page.py").status_code == 404
