"""One log line per request, and the id by which a client and the log speak of the same one."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softbatch.server.http.auth import is_probe
from softbatch.server.http.errors import error_response, internal_error
from softbatch.server.observability.request_record import RequestRecord, begin, current
from softbatch.server.request_failures import printable

if TYPE_CHECKING:
    from softbatch.server.observability.tracing import OpenTrace, Tracing

logger = logging.getLogger(__name__)
HEADER = "X-Request-Id"
# Where the id stands for those who answer in the place of the app.
SCOPE_KEY = "softbatch.request_id"
# Characters that break neither a line of a log nor a header.
_USABLE_ID = re.compile(r"[A-Za-z0-9._:@/+=~-]{1,128}")
# W3C's: version, trace id, span id, flags.
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
MAX_PATH_CHARS = 200
# What a proxy logs for a client that was gone before the reply began.
CLIENT_GONE = 499


def request_id(headers: Headers) -> str:
    """The client's own, or else a new one."""
    given = headers.get(HEADER, "")
    return given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex


class RequestLogMiddleware:
    """Logs each request at its end, with status, tokens and seconds; probes of the health routes are not logged. What
    is logged is traced too, if there is `tracing`."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self.app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(request_id(headers))
        scope[SCOPE_KEY] = record.id
        if parent := _TRACE_PARENT.fullmatch(headers.get("traceparent", "").strip()):
            record.trace_id = parent[1]
        begin(record)
        opened = self._tracing and self._tracing.begin(record, scope["method"], scope["path"], headers)
        began = time.monotonic()
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append(HEADER, record.id)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status != CLIENT_GONE:
                raise
            # Here rather than at the very outside, so that this reply too has its id.
            failure = internal_error(error, f"{scope['method']} {scope['path'][:MAX_PATH_CHARS]!r}", record.id)
            await error_response(failure, scope["path"])(scope, receive, send_with_id)
        finally:
            if not is_probe(scope["path"]):
                _log(scope, record, status, time.monotonic() - began)
            if opened:
                self._end_trace(opened, scope, record, status)
            record.started.clear()  # the connection's timers keep the record while the connection lives

    def _end_trace(self, opened: OpenTrace, scope: Scope, record: RequestRecord, status: int) -> None:
        assert self._tracing is not None
        try:
            self._tracing.end(opened, scope["method"], getattr(scope.get("route"), "path", None), record, status)
        except Exception:  # of no concern to a client that has its answer
            logger.exception("a request could not be traced")


class RequestFields(logging.Filter):
    """Puts the id of the request, and of its trace, behind what is logged on behalf of one."""

    def filter(self, record: logging.LogRecord) -> bool:
        request = current()
        if request.id and not hasattr(record, "fields"):
            record.fields = _ids(request)
        return True


def _ids(record: RequestRecord) -> dict[str, object]:
    return {"id": record.id, "trace_id": record.trace_id} if record.trace_id else {"id": record.id}


def _log(scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
    fields: dict[str, object] = {**_ids(record), "status": status, "seconds": round(seconds, 4)}
    if record.owner:
        fields["key"] = record.owner
    if record.started:
        fields["prompt_tokens"] = record.prompt_tokens
        fields["completion_tokens"] = record.completion_tokens
    path = printable(scope["path"][:MAX_PATH_CHARS])
    logger.info("%s %s", scope["method"], path, extra={"fields": fields})
