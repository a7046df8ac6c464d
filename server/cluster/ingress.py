"""The ingress: what Serve's proxy talks to. It forwards requests to replicas, and knows no model."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softbatch.scheduler.engine.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from softbatch.server.cluster.body_room import BodyRoom, HeldBody, NoRoom
from softbatch.server.cluster.forwarding import Forwarding
from softbatch.server.cluster.model_directory import ModelDirectory, ModelTarget, cards_in
from softbatch.server.cluster.prefixes import prefix_key
from softbatch.server.cluster.request_kinds import is_generating, may_be_asked_twice, names_in, place_of
from softbatch.server.cluster.wire import Asked, Headers, ReplyPart, Said, decode_said, encode_asked
from softbatch.server.http.auth import AuthMiddleware
from softbatch.server.http.body_limit import MAX_JSON_BYTES, BodyLimitMiddleware
from softbatch.server.http.content_encoding import ContentEncodingMiddleware
from softbatch.server.http.errors import error_response
from softbatch.server.http.head_and_slashes import canonical
from softbatch.server.schemas.models import PLACEHOLDERS
from softbatch.server.settings import Settings

MODELS_PATH = "/v1/models"
# What a replica's death looks like, and that of its node, which takes along what had been said and not yet fetched.
LOST_BY = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError)
# Of several models: whose soft prompts, files, metrics or health are meant.
MODEL_HEADER = b"x-softbatch-model"


class Ingress:
    """What is refused without a model, for its key or its size, is refused here, before the body is read."""

    def __init__(self, settings: Settings, models: Sequence[frozenset[str]], *handles: Any) -> None:
        os.environ.update({LEVEL_VARIABLE: settings.log_level, FORMAT_VARIABLE: settings.log_format})
        configure_logging()
        self._directory = ModelDirectory(
            [ModelTarget(names, handle, _own_key(settings)) for names, handle in zip(models, handles, strict=True)],
            self._list_cards,
        )
        self._room = BodyRoom()
        read = BodyLimitMiddleware(
            ContentEncodingMiddleware(self._forward),
            max_upload_bytes=settings.max_prompt_mib << 20,
            max_file_bytes=settings.max_batch_file_bytes,
        )
        checked = AuthMiddleware(read, settings.api_key, settings.admin_key)
        # A browser's question whether it may ask carries no key.
        self._app: ASGIApp = lambda scope, receive, send: (read if scope["method"] == "OPTIONS" else checked)(
            scope, receive, send
        )

    async def __call__(self, request: Request) -> Response:
        return _Forwarded(self._app)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room.held() as held:
            try:
                body = await _body(receive, held)
            except NoRoom as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
            if body is not None:
                await self._answer(scope, body, receive, send)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        path, deployment = canonical(scope["path"])
        several = len(self._directory.targets) > 1
        if several and path == MODELS_PATH and scope["method"] == "GET":
            await self._send_cards(scope, send)
            return
        target, needed = await self._target(scope, path, deployment, body)
        asked = _asked(scope)
        if is_generating(scope["method"], path):
            asked = msgspec.structs.replace(asked, entries=[])
        repeatable = may_be_asked_twice(scope["method"], path)
        forwarding = Forwarding(asked, send, LOST_BY, repeatable=repeatable)
        await _until_gone(forwarding.run(lambda entries: self._ask(target, asked, entries, body, needed)), receive)
        if several and forwarding.status == 404:
            self._directory.forget(needed)

    async def _target(self, scope: Scope, path: str, deployment: str, body: bytes) -> tuple[ModelTarget, str]:
        """Who is to answer, and what it should hold."""
        headers = dict(scope["headers"])
        named = names_in(body) if scope["method"] == "POST" and len(body) <= MAX_JSON_BYTES else names_in(b"{}")
        model = deployment if deployment and named.model in PLACEHOLDERS else named.model
        model = model or headers.get(MODEL_HEADER, b"").decode("latin-1")
        if path.startswith(f"{MODELS_PATH}/"):
            model = path.removeprefix(f"{MODELS_PATH}/")
        place = place_of(path)
        if place:  # what a compression's body names is no soft prompt yet
            target, _ = await self._directory.find(headers.get(MODEL_HEADER, b"").decode("latin-1"), "")
            return target, place
        target, needed = await self._directory.find(model, named.soft_prompt)
        return target, needed or prefix_key(named.start) if is_generating(scope["method"], path) else ""

    async def _ask(
        self, target: ModelTarget, asked: Asked, entries: list[bytes] | None, body: bytes, needed: str
    ) -> AsyncGenerator[list[Said], None]:
        head = encode_asked(msgspec.structs.replace(asked, entries=entries))
        response = target.handle.options(stream=True, multiplexed_model_id=needed).answer.remote(head, body)
        ended = False
        try:
            async for data in response:
                yield decode_said(data)
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def _list_cards(self, target: ModelTarget, headers: Headers) -> list[dict[str, Any]]:
        asked = Asked(method="GET", path=MODELS_PATH, raw_path=MODELS_PATH.encode(), query_string=b"", headers=headers)
        body = b""
        for _ in range(2):  # a second time if the first replica dies
            with contextlib.suppress(*LOST_BY):
                async for said in self._ask(target, asked, None, b"", ""):
                    body += b"".join(part.data for part in said if isinstance(part, ReplyPart))
                break
        return cards_in(body)

    async def _send_cards(self, scope: Scope, send: Send) -> None:
        cards = await self._directory.cards(list(scope["headers"]))
        body = msgspec.json.encode({"object": "list", "data": cards})
        await Response(body, media_type="application/json")(scope, _nothing, send)


class _Forwarded(Response):
    """What Serve takes for a reply: it runs the app."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _body(receive: Receive, held: HeldBody) -> bytes | None:
    """None if the client has gone. Raises NoRoom."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        data = message.get("body", b"")
        held.grow(len(data))
        body += data
        more = message.get("more_body", False)
    return bytes(body)


async def _until_gone(work: Any, receive: Receive) -> None:
    """Cancels it when the client goes."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    raise AssertionError


def _own_key(settings: Settings) -> Headers:
    key = next(iter((*settings.admin_key, *settings.api_key)), None)
    return [(b"authorization", f"Bearer {key}".encode())] if key else []


def _asked(scope: Scope) -> Asked:
    client, server = scope.get("client"), scope.get("server")
    return Asked(
        method=scope["method"],
        path=scope["path"],
        raw_path=scope.get("raw_path") or scope["path"].encode(),
        query_string=scope.get("query_string", b""),
        headers=[(bytes(name), bytes(value)) for name, value in scope["headers"]],
        scheme=scope.get("scheme", "http"),
        http_version=scope.get("http_version", "1.1"),
        client=tuple(client) if client else None,
        server=tuple(server) if server else None,
    )
