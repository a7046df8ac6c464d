"""`/console` without a browser: what it may load, who may open it, and what is never written into it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi.testclient import TestClient

from softbatch.server.app import create_app
from softbatch.server.http.console_page import FILES
from softbatch.server.services import Services
from softbatch.server.settings import Settings

SCRIPTS = sorted(FILES.glob("*.js"))


def client_with(*keys: str, root_path: str = "", **settings: object) -> TestClient:
    services = SimpleNamespace(tracing=None, settings=Settings.model_construct(api_key=keys, **settings))
    return TestClient(create_app(cast(Services, services)), root_path=root_path)


@pytest.mark.parametrize("keys", [(), ("key",)], ids=["open", "with a key"])
def test_page_and_files_come_from_here_and_nothing_else_may(keys: tuple[str, ...]) -> None:
    client = client_with(*keys)
    page = client.get("/console")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    named = re.findall(r'(?:src|href)="(console/assets/[^"]+)"', page.text)
    assert len(named) > 5
    imported = {
        f"console/assets/{name}" for path in SCRIPTS for name in re.findall(r'"\./(\w+\.js)"', path.read_text())
    }
    for path in {*named, *imported}:
        assert client.get(f"/{path}").status_code == 200, path
    assert "://" not in page.text
    assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=", page.text)


def test_texts_are_set_as_texts() -> None:
    for path in SCRIPTS:
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        assert len(text.splitlines()) < 300, path


def test_it_stands_below_the_path_that_a_proxy_adds() -> None:
    page = client_with(root_path="/here").get("/console")
    assert '<base href="/here/">' in page.text


def test_it_can_be_left_out() -> None:
    client = client_with(no_console=True)
    assert client.get("/console").status_code == 404
    assert client.get("/console/assets/app.js").status_code == 404


def test_with_a_key_the_page_alone_is_open() -> None:
    client = client_with("key")
    assert client.get("/v1/queue/events").status_code == 401
    assert client.post("/console").status_code == 401
    assert client.get("/console/other").status_code == 401
