"""Objects below one address of an object store, by fsspec: every call bounded in time and tried again."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.bucket_files import BucketFiles, Etag, ObjectInfo, PlainFiles, S3Files, is_same

logger = logging.getLogger(__name__)
T = TypeVar("T")
EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
# Which asking again does not change.
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError)
# That write one object at the same moment, to see whether the store lets one of them through.
_RIVALS = 4
# How often they do: a store that lets several through need not do so each time.
_ROUNDS = 3
_BARRIER_SECONDS = 30.0
# Where the objects lie that are written to see all that.
PROBES = ".probes/"
# At an object, before it is taken for another than was written.
_LOOKS = 4


class BucketError(OSError):
    """The object store gave no right answer, however often it was asked. The text names object and reason."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)


class BucketDenied(PermissionError):
    """The credentials do not allow it. The text names the object."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EACCES, message)


class BucketAddressError(SoftPromptError):
    """The address cannot be used at all; the message says what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="prompt_store", code="invalid_store")


@dataclass(frozen=True)
class Retries:
    """`seconds` for one call; pauses double from `first_pause` up to `longest_pause`."""

    tries: int = 6
    seconds: float = 10.0
    first_pause: float = 0.1
    longest_pause: float = 2.0


@dataclass(frozen=True)
class Offers:
    """What the object store was seen to do: to create only, to replace only what is known, to write at all. A store
    that looks at the condition when a write begins, and not when it ends, lets several through: that is no offer."""

    create: bool
    replace: bool
    write: bool = True

    @property
    def jobs(self) -> bool:
        """Whether several servers may keep them there: each is created once, and replaced by who knows it."""
        return self.create and self.replace


class Bucket:
    """Thread-safe, and without a state of its own. A key is a path below the address."""

    def __init__(self, url: str, retries: Retries | None = None) -> None:
        """Raises BucketAddressError."""
        self.url = url.rstrip("/")
        self.retries = retries or Retries()
        self._files = _files_of(url)

    @contextlib.contextmanager
    def _named(self, key: str) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise BucketDenied(f"{self.url}/{key}: access denied ({error.strerror or error})") from error

    def probe(self) -> Offers:
        """Write, write again and delete small objects. Raises BucketError, or FileNotFoundError without a bucket."""
        key = f"{PROBES}{secrets.token_hex(8)}"
        created, replaced = ([f"{key}-{number}-{what}" for number in range(_ROUNDS)] for what in ("rivals", "replaced"))
        try:
            self.write(key, b"1")
        except PermissionError:
            self.list(key)  # raises where not even this may be done
            return Offers(create=False, replace=False, write=False)
        try:
            return Offers(
                self._creates(key, created),
                self._files.can_replace and self._replaces(key) and self._keeps_apart(replaced),
            )
        finally:
            for one in (key, *created, *replaced):
                with contextlib.suppress(OSError):
                    self.delete(one)

    def _creates(self, there: str, keys: Sequence[str]) -> bool:
        with contextlib.suppress(NotImplementedError):
            return not self.create(there, b"2") and all(_is_won_once(partial(self.create, key)) for key in keys)
        return False

    def _replaces(self, key: str) -> bool:
        found = self.read(key)
        with contextlib.suppress(NotImplementedError):
            changed = None if found is None else self.replace(key, b"3", found[1])
            return changed is not None and found is not None and self.replace(key, b"4", found[1]) is None
        return False

    def _keeps_apart(self, keys: Sequence[str]) -> bool:
        """Whether of several that replace one object one does."""

        def is_won_once(key: str) -> bool:
            self.write(key, b"1")
            found = self.read(key)
            return found is not None and _is_won_once(lambda content: self.replace(key, content, found[1]) is not None)

        return all(is_won_once(key) for key in keys)

    def read(self, key: str) -> tuple[bytes, Etag] | None:
        with contextlib.suppress(FileNotFoundError):
            return self._ask("read", key, lambda seconds: self._files.read(key, seconds))
        return None

    def etag(self, key: str, retries: Retries | None = None) -> Etag | None:
        """None where there is no such object."""
        with contextlib.suppress(FileNotFoundError):
            return self._ask("look at", key, lambda seconds: self._files.etag(key, seconds), retries)
        return None

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """All objects whose keys begin so."""
        return self._ask("list", prefix, lambda seconds: self._files.list(prefix, seconds))

    def write(self, key: str, content: bytes) -> None:
        self._ask("write", key, lambda seconds: self._files.write(key, content, seconds))

    def create(self, key: str, content: bytes) -> bool:
        """False where there is such an object, with other content. Only where the store offers it is it no race. Raises
        NotImplementedError if it says that it does not."""
        try:
            self._ask("create", key, lambda seconds: self._files.create(key, content, seconds))
        except FileExistsError:
            # An earlier try may have got through, and only its answer been lost.
            return self.holds(key, content) is not None
        return True

    def holds(self, key: str, content: bytes) -> Etag | None:
        """The ETag of the object if it is this. One that is another is read again, until it was twice the same, as it
        may have been damaged on its way."""
        before = None
        for _ in range(_LOOKS):
            found = self.read(key)
            if found is None or found == before:
                return None
            if found[0] == content:
                return found[1]
            before = found
        return None

    def replace(self, key: str, content: bytes, etag: Etag) -> Etag | None:
        """None, and nothing is written, unless the object is still the one with this ETag. Raises like `create`."""
        try:
            return self._ask("replace", key, lambda seconds: self._files.replace(key, content, etag, seconds))
        except (FileExistsError, FileNotFoundError):
            return self.holds(key, content)

    def delete(self, key: str, etag: Etag | None = None) -> None:
        """Does nothing where there is no such object. With `etag` it is only tried again while the object is still
        that one: a try whose answer was lost may have deleted it, and another be there since."""
        tries = 0

        def call(seconds: float) -> None:
            nonlocal tries
            tries += 1
            if tries == 1 or etag is None or is_same(self._files.etag(key, seconds), etag):
                self._files.delete(key, seconds)

        with contextlib.suppress(FileNotFoundError):
            self._ask("delete", key, call)

    def download(self, key: str, path: Path) -> None:
        """Whatever arrives: the caller checks it. Raises FileNotFoundError."""
        self._ask("read", key, lambda seconds: self._files.download(key, path, 20 * seconds))

    def upload(self, path: Path, key: str) -> None:
        self._ask("write", key, lambda seconds: self._files.upload(path, key, 20 * seconds))

    def _ask(self, what: str, key: str, call: Callable[[float], T], retries: Retries | None = None) -> T:
        retries = retries or self.retries
        reason: Exception | None = None
        for attempt in range(retries.tries):
            if attempt:
                pause = min(retries.longest_pause, retries.first_pause * 2 ** (attempt - 1))
                time.sleep(pause * random.uniform(0.5, 1))
            try:
                with self._named(key):
                    return call(retries.seconds)
            except _ANSWERS:
                raise
            except Exception as error:  # each library has its own for what goes wrong on the way
                reason = error
                logger.debug("%s %s/%s, try %d: %r", what, self.url, key, attempt + 1, error)
        said = f"{type(reason).__name__}: {reason}".strip(": ")
        raise BucketError(f"cannot {what} {self.url}/{key} ({retries.tries} tries): {said[:300]}") from reason

    def hasty(self, tries: int = 1, seconds: float = 2.0) -> Bucket:
        """The same objects, for whoever cannot wait."""
        other = object.__new__(Bucket)
        other.url, other._files = self.url, self._files
        other.retries = replace(self.retries, tries=tries, seconds=min(seconds, self.retries.seconds))
        return other


def _is_won_once(write: Callable[[bytes], bool]) -> bool:
    """Whether of several that write at the same moment, each another content, one is told that it did."""
    start = threading.Barrier(_RIVALS)

    def rival(number: int) -> bool:
        try:
            start.wait(_BARRIER_SECONDS)
        except threading.BrokenBarrierError:
            return False  # they did not come together, so nothing is seen
        return write(f"rival {number}".encode())

    with ThreadPoolExecutor(_RIVALS) as rivals:
        return sum(rivals.map(rival, range(_RIVALS))) == 1


def _files_of(url: str) -> BucketFiles:
    import fsspec

    protocol, _, path = url.partition("://")
    path = path.strip("/")
    if protocol not in fsspec.available_protocols():
        raise BucketAddressError(f"{url}: {protocol} is no kind of object store; give a directory, s3://… or gs://…")
    who, is_named, _ = path.partition("/")[0].rpartition("@")
    if is_named and ":" in who:  # the address stands in logs and in answers; Azure's has a container before the @
        raise BucketAddressError(
            f"{protocol}://…: take the password out of the address, and give it in the environment"
        )
    if not path:
        raise BucketAddressError(f"{url}: name a bucket, as in {protocol}://bucket/prefix")
    package, extra = EXTRAS.get(protocol, (None, None))
    try:
        if package is not None:
            importlib.import_module(package)
        made = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        advice = f"pip install 'softbatch[{extra}]'" if extra else str(error)
        raise BucketAddressError(f"{url}: a package that reads {protocol}:// is missing: {advice}") from error
    for library in ("aiobotocore", "botocore"):
        logging.getLogger(library).setLevel(logging.WARNING)  # each says at every start where it has found credentials
    return S3Files(made, path) if package == "s3fs" else PlainFiles(made, path)
