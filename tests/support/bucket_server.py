"""An S3 server for tests: moto's, in a thread of this process, with its credentials in the environment."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from softbatch.prompt_store.stores.bucket import Bucket, Retries
from softbatch.prompt_store.stores.object_store import ObjectStore

NAME = "soft-prompts"
QUICK = Retries(tries=6, seconds=10, first_pause=0.01, longest_pause=0.05)


@dataclass(frozen=True)
class BucketServer:
    """`environment` is what a process needs to find it."""

    endpoint: str

    @property
    def environment(self) -> Mapping[str, str]:
        return environment_of(self.endpoint)

    def new_url(self) -> str:
        """A prefix that nobody else uses."""
        return f"s3://{NAME}/{uuid.uuid4().hex}"


def environment_of(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


@contextlib.contextmanager
def running_bucket_server() -> Iterator[BucketServer]:
    """Skips where the packages are missing."""
    moto_server = pytest.importorskip("moto.server", reason="no S3 server: pip install 'softbatch[dev]'")
    pytest.importorskip("s3fs", reason="no S3 client: pip install s3fs")
    import logging

    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = BucketServer(f"http://{host}:{port}")
    before = dict(os.environ)
    os.environ.update(found.environment)
    try:
        boto3.client("s3").create_bucket(Bucket=NAME)
        yield found
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


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
