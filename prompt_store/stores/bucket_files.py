"""What a bucket does with its objects, once and without trying again: by fsspec, and by S3's own calls."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

Etag = str
_UNKNOWN_VERSION = ""
_TRIES = 5


@dataclass(frozen=True)
class ObjectInfo:
    """`modified` is in Unix seconds of the object store's clock."""

    key: str
    num_bytes: int
    etag: Etag
    modified: float | None


class BucketFiles(Protocol):
    """Each call may take `seconds`. Raises FileNotFoundError, PermissionError, NotImplementedError for a condition that
    the store does not know, or whatever the library does."""

    can_replace: bool

    def read(self, key: str, seconds: float) -> tuple[bytes, Etag]: ...

    def etag(self, key: str, seconds: float) -> Etag: ...

    def list(self, prefix: str, seconds: float) -> Sequence[ObjectInfo]: ...

    def write(self, key: str, content: bytes, seconds: float) -> None: ...

    def create(self, key: str, content: bytes, seconds: float) -> None:
        """Raises FileExistsError."""
        ...

    def replace(self, key: str, content: bytes, etag: Etag, seconds: float) -> Etag:
        """Raises FileExistsError where the object is another by now."""
        ...

    def delete(self, key: str, seconds: float) -> None: ...

    def download(self, key: str, path: Path, seconds: float) -> None: ...

    def upload(self, path: Path, key: str, seconds: float) -> None: ...


class PlainFiles:
    """Any file system of fsspec. `options` are its own; what it remembers of listings is never used."""

    can_replace = False

    def __init__(self, made: Any, root: str, **options: Any) -> None:
        self._root = root.strip("/")
        self._system = made(use_listings_cache=False, **options)

    def read(self, key: str, seconds: float) -> tuple[bytes, Etag]:
        before = self.etag(key, seconds)
        content = self._system.cat_file(self._path(key), **self._within(seconds))
        if self.etag(key, seconds) != before:
            raise BlockingIOError(f"{key} is being written")
        return bytes(content), before

    def etag(self, key: str, seconds: float) -> Etag:
        return _etag_of(self._system.info(self._path(key), **self._within(seconds)))

    def list(self, prefix: str, seconds: float) -> Sequence[ObjectInfo]:
        folder, _, start = prefix.rpartition("/")
        self._system.invalidate_cache()
        try:
            found = self._system.find(self._path(folder), detail=True, **self._within(10 * seconds))
        except FileNotFoundError:
            return []
        skipped = len(self._root) + 1
        infos = [(str(path).strip("/")[skipped:], info) for path, info in found.items()]
        return [
            ObjectInfo(key, int(info.get("size") or 0), _etag_of(info), _time_of(info))
            for key, info in infos
            if key.startswith(f"{folder}/{start}" if folder else start)
        ]

    def write(self, key: str, content: bytes, seconds: float) -> None:
        self._system.pipe_file(self._path(key), content, **self._within(seconds))

    def create(self, key: str, content: bytes, seconds: float) -> None:
        self._system.pipe_file(self._path(key), content, mode="create", **self._within(seconds))

    def replace(self, key: str, content: bytes, etag: Etag, seconds: float) -> Etag:
        raise NotImplementedError

    def delete(self, key: str, seconds: float) -> None:
        self._system.rm_file(self._path(key), **self._within(seconds))

    def download(self, key: str, path: Path, seconds: float) -> None:
        self._system.get_file(self._path(key), str(path), **self._within(seconds))

    def upload(self, path: Path, key: str, seconds: float) -> None:
        self._system.put_file(str(path), self._path(key), **self._within(seconds))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    def _within(self, seconds: float) -> dict[str, float]:
        """Only file systems that run in a loop of their own can be given up in time."""
        return {"timeout": seconds} if getattr(self._system, "async_impl", False) else {}


class S3Files(PlainFiles):
    """S3's conditional writes are calls of its own. Tries and pauses are the caller's, not those of the library."""

    can_replace = True

    def __init__(self, made: Any, root: str) -> None:
        config = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}} | _plain_checksums()
        # Named, so that fsspec does not give one client for two endpoints.
        client = {"endpoint_url": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")}
        super().__init__(made, root, config_kwargs=config, client_kwargs=client)
        self._system.retries = 1
        self._bucket, _, self._prefix = self._root.partition("/")
        self._is_unquoted = False  # how `If-Match` has to be written

    def read(self, key: str, seconds: float) -> tuple[bytes, Etag]:
        from fsspec.asyn import sync

        async def call() -> tuple[bytes, Etag]:
            reply = await self._system._call_s3("get_object", **self._where(key))
            async with reply["Body"] as body:
                return await body.read(), reply["ETag"]

        content: tuple[bytes, Etag] = sync(self._system.loop, call, timeout=seconds)
        return content

    def etag(self, key: str, seconds: float) -> Etag:
        return str(self._system.call_s3("head_object", **self._where(key), timeout=seconds)["ETag"])

    def write(self, key: str, content: bytes, seconds: float) -> None:
        self._put(key, content, seconds)

    def create(self, key: str, content: bytes, seconds: float) -> None:
        self._put(key, content, seconds, IfNoneMatch="*")

    def replace(self, key: str, content: bytes, etag: Etag, seconds: float) -> Etag:
        return self._put(key, content, seconds, IfMatch=etag)

    def delete(self, key: str, seconds: float) -> None:
        self._system.call_s3("delete_object", **self._where(key), timeout=seconds)

    def _put(self, key: str, content: bytes, seconds: float, **condition: str) -> Etag:
        """What arrived damaged is replaced, unless another did so meanwhile, as far as the store can tell."""
        is_damaged = False
        for _ in range(_TRIES):
            try:
                etag = self._put_once(key, content, seconds, condition)
            except NotImplementedError:
                if not is_damaged:
                    raise
                condition = {}
                continue
            # Not the MD5 either where the store encrypts with a key of the user's.
            if etag.strip('"') == _md5(content) or self._is(key, content, seconds):
                return etag
            is_damaged, condition = True, {"IfMatch": etag}
        raise ConnectionError(f"{key} arrives damaged in the bucket")

    def _put_once(self, key: str, content: bytes, seconds: float, condition: dict[str, str]) -> Etag:
        known = condition.get("IfMatch")
        if known is None:
            return self._send(key, content, seconds, condition)
        was_unquoted, unquoted = self._is_unquoted, {"IfMatch": known.strip('"')}
        try:
            return self._send(key, content, seconds, unquoted if was_unquoted else condition)
        except FileExistsError:
            if was_unquoted or not is_same(self.etag(key, seconds), known):
                raise
        # It is that very object: older Cephs compare what stands between the quotes, which S3 takes too.
        etag = self._send(key, content, seconds, unquoted)
        self._is_unquoted = True
        return etag

    def _send(self, key: str, content: bytes, seconds: float, condition: dict[str, str]) -> Etag:
        """Raises FileExistsError where the condition does not hold."""
        try:
            reply = self._system.call_s3("put_object", **self._where(key), Body=content, **condition, timeout=seconds)
            return str(reply["ETag"])
        except Exception as error:
            code = _code_of(error)
            if condition and code in ("NotImplemented", "501"):
                raise NotImplementedError(str(error)) from error
            if code not in ("PreconditionFailed", "412"):
                raise
            raise FileExistsError(key) from error

    def _is(self, key: str, content: bytes, seconds: float) -> bool:
        try:
            return self.read(key, seconds)[0] == content
        except Exception:  # among them that the store's own checksum is another
            return False

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}/{key}" if self._prefix else key}


def _plain_checksums() -> dict[str, str]:
    """Without the checksums that Amazon's client sends since 2025, over TLS as a trailer, which some stores refuse.
    What is written is read back, or has the MD5 that the store tells. Whoever says what he wants has that."""
    from botocore.config import Config

    option = "request_checksum_calculation"
    if f"AWS_{option.upper()}" in os.environ:
        return {}
    return {option: "when_required"} if option in Config.OPTION_DEFAULTS else {}


def is_same(one: Etag, other: Etag) -> bool:
    """Some stores write quotes in one place and leave them out in another."""
    return one.strip('"') == other.strip('"')


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _code_of(error: BaseException) -> str:
    """S3's own word for what went wrong, which s3fs hides behind an OSError."""
    seen: BaseException | None = error
    while seen is not None:
        reply = getattr(seen, "response", None)
        if isinstance(reply, dict):
            return str(reply.get("Error", {}).get("Code", ""))
        seen = seen.__cause__
    return ""


def _etag_of(info: dict[str, Any]) -> Etag:
    for field in ("ETag", "etag", "generation"):
        if info.get(field):
            return str(info[field])
    return f"{info.get('mtime') or info.get('created') or _UNKNOWN_VERSION}-{info.get('size')}"


def _time_of(info: dict[str, Any]) -> float | None:
    for field in ("LastModified", "updated", "mtime", "created"):
        found = info.get(field)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
    return None
