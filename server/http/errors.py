"""The one map from failures to HTTP statuses, and the only shapes errors leave the server in."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from softbatch.prompt_store.stores.bucket import BucketDenied, BucketError
from softbatch.server.http.route_hints import meant
from softbatch.server.observability.request_record import current
from softbatch.server.request_failures import (
    BatchesUnavailable,
    BatchFileInUse,
    BatchNotRunning,
    CompressionEnded,
    CompressionNameTaken,
    CompressionNotFound,
    CompressionsUnavailable,
    DeadlineExceeded,
    EngineAway,
    EngineGone,
    Failure,
    GrammarsUnavailable,
    InvalidGrammar,
    InvalidPrompt,
    PromptTooLong,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestKillsEngine,
    SequenceChanged,
    SoftPromptOfAnotherModel,
    StorageFull,
    StorageUnwritable,
    TooManyBatches,
    TooManyCompressions,
    TooManySequences,
    UnknownBatch,
    UnknownBatchFile,
    UnknownSoftPrompt,
    UnusableSoftPrompt,
    shown,
    storage_failure,
)

logger = logging.getLogger(__name__)
METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")

MAX_MESSAGE_CHARS = 1000
# Clients decide on these whether to retry, so an error raised without a code gets its status's own.
_DEFAULT_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    429: "rate_limit_exceeded",
    503: "unavailable",
}


# Whose clients expect text-generation-inference's shape of errors.
TGI_PATHS = frozenset({"/", "/generate", "/generate_stream", "/invocations"})
# Whose clients expect Anthropic's.
ANTHROPIC_PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
# Anthropic's word for each status that has one of its own. What it says with 529 is 503 here.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

STATUS: Mapping[type[Failure], int] = {
    InvalidGrammar: 400,
    InvalidPrompt: 400,
    PromptTooLong: 400,
    TooManySequences: 400,
    CompressionNotFound: 404,
    UnknownBatch: 404,
    UnknownBatchFile: 404,
    UnknownSoftPrompt: 404,
    BatchFileInUse: 409,
    BatchNotRunning: 409,
    CompressionEnded: 409,
    CompressionNameTaken: 409,
    SoftPromptOfAnotherModel: 409,
    UnusableSoftPrompt: 422,
    QueueFull: 429,
    TooManyBatches: 429,
    TooManyCompressions: 429,
    # No status that clients retry by themselves.
    RequestCancelled: 499,
    RequestFailed: 500,
    RequestKillsEngine: 500,
    BatchesUnavailable: 503,
    CompressionsUnavailable: 503,
    EngineAway: 503,
    GrammarsUnavailable: 503,
    EngineGone: 503,
    SequenceChanged: 503,
    StorageUnwritable: 503,
    DeadlineExceeded: 504,
    StorageFull: 507,
}


class ApiError(Failure):
    """An answer other than 2xx: `{"error": {"message", "type", "param", "code"}}` with an HTTP status; on the routes of
    text-generation-inference `{"error", "error_type", "param", "code"}`, on Anthropic's `{"type": "error", "error":
    {"type", "message", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The error types that OpenAI's clients know."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "requests"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def anthropic_type(self) -> str:
        """The error types that Anthropic's clients know."""
        return _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")

    @property
    def tgi_type(self) -> str:
        """The error types that text-generation-inference's clients know; of others they look at the status."""
        if self.status in (429, 503):
            return "overloaded"
        if self.status >= 500:
            return "generation"
        return {401: "authentication", 404: "not_found"}.get(self.status, "validation")


def as_api_error(failure: Failure) -> ApiError:
    """The answer that a failure from below becomes."""
    if isinstance(failure, ApiError):
        return failure
    headers = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
    if isinstance(failure, DeadlineExceeded):
        # OpenAI's clients send a request again after any 5xx, unless told not to: late as it is, and to a busy server.
        headers["X-Should-Retry"] = "false"
    return ApiError(STATUS[type(failure)], failure.message, param=failure.param, code=failure.code, headers=headers)


def invalid(param: str, message: str, *, code: str | None = None) -> ApiError:
    """400: `param` has a value that cannot be used; `message` says what would be right."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def unknown_model(name: str) -> ApiError:
    """404: no model and no soft prompt of this name."""
    return ApiError(
        404,
        f"the model {shown(name)} does not exist; GET /v1/models lists the base model and every soft prompt",
        param="model",
        code="model_not_found",
    )


def unavailable(message: str, *, code: str = "unavailable", retry_after: int = 5) -> ApiError:
    """503: not now; the same request may work in `retry_after` seconds."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def error_json(error: ApiError, path: str) -> str:
    """The body of an error reply, also sent as the last event of a stream that fails, as the clients of the route at
    `path` know it. Plain ASCII."""
    message = error.message[:MAX_MESSAGE_CHARS]
    known = {"param": error.param, "code": error.code or _DEFAULT_CODES.get(error.status)}
    body: dict[str, Any] = {"error": {"message": message, "type": error.type, **known}}
    if path in TGI_PATHS:
        body = {"error": message, "error_type": error.tgi_type, **known}
    elif path in ANTHROPIC_PATHS:
        body = {"type": "error", "error": {"type": error.anthropic_type, "message": message, **known}}
    return json.dumps(body, separators=(",", ":"))


def note_error(error: ApiError) -> None:
    """For the record of the request that gets it."""
    current().error = error.code or _DEFAULT_CODES.get(error.status) or str(error.status)


def error_response(error: ApiError, path: str) -> Response:
    """The error as an ASGI response, for handlers and middlewares alike."""
    note_error(error)
    return Response(error_json(error, path), error.status, error.headers, media_type="application/json")


def internal_error(exc: BaseException, where: str, request_id: str | None = None) -> ApiError:
    """500 that carries nothing but an id; the log has the same id and the traceback."""
    request_id = request_id or secrets.token_hex(8)
    logger.error("internal error %s in %s", request_id, where, exc_info=exc)
    return ApiError(500, f"internal error {request_id}; see the server's log", code="internal_error")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found, as one 400 about the first field at fault; never echoes what was sent."""
    first = errors[0]
    # FastAPI puts 'body', 'path' or 'query' in front.
    path = [str(part) for part in first["loc"][1:]]
    context = first.get("ctx") or {}
    kind = first["type"]
    if kind == "json_invalid":
        where = f"{context.get('error', 'syntax error')}, at character {path[0] if path else 0}"
        return ApiError(400, f"the body is not valid JSON: {where}", code="invalid_json")
    if "param" in context:
        path.append(str(context["param"]))
    param = ".".join(path)[:256] or None
    if param is None:
        message = "a JSON object is expected as body, with the header 'Content-Type: application/json'"
        if kind not in ("missing", "not_an_object"):
            message = first["msg"]
        return ApiError(400, message, code="invalid_body")
    message = "required, but missing" if kind == "missing" else first["msg"]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(400, f"{param}: {message[:1].lower()}{message[1:]}{more}", param=param, code=kind)


def install_handlers(app: FastAPI) -> None:
    """Give every error of the app, expected or not, the one shape."""

    async def on_failure(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, Failure)
        return error_response(as_api_error(exc), request.scope["path"])

    async def on_validation_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        return error_response(validation_error(exc.errors()), request.scope["path"])

    async def on_http_exception(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return error_response(_from_http_exception(request, exc), request.scope["path"])

    async def on_os_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, OSError)
        is_of_bucket = isinstance(exc, BucketError | BucketDenied)
        if exc.filename is None and not is_of_bucket:  # none of the disk's either, such as a broken connection's
            return await on_exception(request, exc)
        what = "bucket" if is_of_bucket else "disk"
        logger.error("%s %.200r: the %s does not work", request.method, request.scope["path"], what, exc_info=exc)
        return error_response(as_api_error(storage_failure(exc)), request.scope["path"])

    async def on_exception(request: Request, exc: Exception) -> Response:
        path = request.scope["path"]
        return error_response(internal_error(exc, f"{request.method} {path[:200]!r}"), path)

    app.add_exception_handler(Failure, on_failure)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(OSError, on_os_error)
    app.add_exception_handler(Exception, on_exception)


def _from_http_exception(request: Request, exc: HTTPException) -> ApiError:
    """Starlette's and FastAPI's own errors: unknown route, wrong method, unreadable body or form."""
    headers = dict(exc.headers or {})
    route = f"{request.method} {shown(request.scope['path'])}"
    if exc.status_code == 404:
        found = meant(request.scope["path"], lambda path: bool(_methods_at(request, path)))
        hint = f"did you mean {found}?" if found else "GET /docs shows those there are"
        return ApiError(404, f"there is no route {route}; {hint}", headers=headers)
    if exc.status_code == 405:
        allowed = ", ".join(_methods_at(request))
        return ApiError(405, f"{route} is not allowed; allowed: {allowed}", headers=headers | {"Allow": allowed})
    if exc.status_code == 400 and exc.__cause__ is not None:
        # FastAPI's answer to a body that breaks the JSON parser itself.
        message = "the body is not valid JSON: it must be UTF-8, and not nested a thousand levels deep"
        return ApiError(400, message, code="invalid_json")
    return ApiError(exc.status_code, str(exc.detail), headers=headers)


def _methods_at(request: Request, path: str | None = None) -> list[str]:
    """The methods of all routes with the path, the request's own if None; Starlette names those of the first alone."""
    scope = request.scope if path is None else {**request.scope, "path": path}
    return [
        method
        for method in METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]
