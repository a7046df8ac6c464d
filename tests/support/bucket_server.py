"""S3 servers for tests, with their credentials in the environment: moto's, and real ones where they are installed."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from softbatch.prompt_store.stores.bucket import Bucket, Offers, Retries
from softbatch.prompt_store.stores.object_store import ObjectStore
from tests.support import ceph_server, swift_server

NAME = "soft-prompts"
QUICK = Retries(tries=6, seconds=10, first_pause=0.01, longest_pause=0.05)
# Which of KINDS the tests run against, by default the first: with a real one they take minutes.
VARIABLE = "SOFTBATCH_TEST_BUCKET"
AS_S3_OFFERS = Offers(create=True, replace=True)


@dataclass(frozen=True)
class BucketServer:
    """`environment` is what a process needs to find it; `offers` is what the store has to find out by itself."""

    endpoint: str
    access_key: str = "test"
    secret_key: str = "test"
    offers: Offers = AS_S3_OFFERS

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def new_url(self) -> str:
        """A prefix that nobody else uses."""
        return f"s3://{NAME}/{uuid.uuid4().hex}"


@contextlib.contextmanager
def _running_moto(directory: Path) -> Iterator[BucketServer]:
    """In a thread of this process. One write at a time: S3 decides conditions when a write ends."""
    moto_server = pytest.importorskip("moto.server", reason="no S3 server: pip install 'softbatch[dev]'")
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = _one_write_at_a_time(server._server.app)
    host, port = server.get_host_and_port()
    try:
        yield BucketServer(f"http://{host}:{port}")
    finally:
        server.stop()


def _one_write_at_a_time(app: Callable[..., Any]) -> Callable[..., Any]:
    writing = threading.Lock()

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with writing if environ["REQUEST_METHOD"] == "PUT" else contextlib.nullcontext():
            return app(environ, start_response)

    return guarded


@contextlib.contextmanager
def _running_swift(directory: Path) -> Iterator[BucketServer]:
    """Its S3 API refuses conditional writes."""
    if not swift_server.is_installed():
        pytest.skip(f"no Swift here: {swift_server.INSTALL}")
    with swift_server.running_swift(directory) as endpoint:
        keys = (swift_server.ACCESS_KEY, swift_server.SECRET_KEY)
        yield BucketServer(endpoint, *keys, Offers(create=False, replace=False))


@contextlib.contextmanager
def _running_ceph(directory: Path) -> Iterator[BucketServer]:
    if not ceph_server.is_installed():
        pytest.skip(f"no Ceph here: {ceph_server.INSTALL}")
    with ceph_server.running_ceph(directory) as endpoint:
        yield BucketServer(endpoint, ceph_server.ACCESS_KEY, ceph_server.SECRET_KEY)


KINDS = {"moto": _running_moto, "swift": _running_swift, "ceph": _running_ceph}


def wanted_kind() -> str:
    return os.environ.get(VARIABLE) or next(iter(KINDS))


@contextlib.contextmanager
def running_bucket_server(kind: str, directory: Path) -> Iterator[BucketServer]:
    """With a bucket in it. Skips where it is not installed."""
    pytest.importorskip("s3fs", reason="no S3 client: pip install s3fs")
    import boto3

    with KINDS[kind](directory) as found:
        before = dict(os.environ)
        os.environ.update(found.environment)
        try:
            boto3.client("s3").create_bucket(Bucket=NAME)
            yield found
        finally:
            os.environ.clear()
            os.environ.update(before)


def object_store(
    url: str,
    root: Path,
    max_bytes: int,
    *,
    cache_bytes: int = 1 << 30,
    refresh: float = 0.0,
    retries: Retries = QUICK,
) -> ObjectStore:
    """One that sees at once what others do, unless `refresh` says otherwise."""
    return ObjectStore(Bucket(url, retries), root, max_bytes, cache_bytes, refresh)
