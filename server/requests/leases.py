"""From the name in a request to the soft prompt the engine loads, for as long as requests use it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from softbatch.prompt_store.atomic_files import process_directory
from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.soft_prompt_file import check_fits
from softbatch.prompt_store.stores.store import SoftPromptStore, StoredPrompt, UnknownPrompt
from softbatch.scheduler.protocol import SoftPromptRef
from softbatch.server.request_failures import (
    SoftPromptOfAnotherModel,
    UnknownSoftPrompt,
    UnusableSoftPrompt,
    storage_failure,
)

logger = logging.getLogger(__name__)
# A name may lead elsewhere as often as this while one request looks at it.
_TRIES = 5
# Two changes of a directory within so short a time may leave it with one and the same time.
DIRECTORY_TIME_NS = 2_000_000_000


@dataclass(frozen=True)
class Lease:
    """One request's hold on a soft prompt; give it back with `SoftPromptLeases.release`."""

    stored: StoredPrompt
    ref: SoftPromptRef


@contextlib.contextmanager
def lease_directory(root: Path) -> Iterator[Path]:
    """A directory for this process's leases inside the store's. For a store that is read-only it lies among the
    temporary files, and leases are copies."""
    with contextlib.ExitStack() as exits:
        try:
            directory = exits.enter_context(process_directory(root, ".leases-"))
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            logger.warning("the prompt store %s is read-only: none of its soft prompts can be added or deleted", root)
            directory = exits.enter_context(process_directory(Path(tempfile.gettempdir()), "softbatch-leases-"))
        yield directory


class SoftPromptLeases:
    """Keeps a file of every soft prompt that a request has used, apart from the registry, under its content hash.

    So a soft prompt that is deleted from the store, by this server or by anybody else, serves the requests that use
    it to their end; only then its leased file goes too, and `on_unused` is told its content hash. Owns `directory`,
    which lies on the store's file system: a lease is a hard link.
    """

    def __init__(
        self, store: SoftPromptStore, spec: ModelSpec, directory: Path, on_unused: Callable[[str], None]
    ) -> None:
        self._store = store
        self._spec = spec
        self._directory = directory
        self._on_unused = on_unused
        self._users: Counter[str] = Counter()
        self._leased: dict[str, Path] = {}
        self._seen: set[str] = set()  # what the engine may hold
        self._names: dict[str, str] = {}  # as they were last used -> content hash
        self._seen_change = 0
        self._retired: set[str] = set()  # deleted from the store, but still in use

    async def acquire(self, name: str) -> Lease:
        """Raises UnknownSoftPrompt, SoftPromptOfAnotherModel, or UnusableSoftPrompt for a broken one."""
        holding = asyncio.ensure_future(self._hold(name))
        try:
            stored = await asyncio.shield(holding)
        except asyncio.CancelledError:
            # The thread at work on the file cannot be stopped: what it yields is given back.
            holding.add_done_callback(self._release_held)
            raise
        except (UnknownPrompt, FileNotFoundError) as error:
            if name in self._names:
                del self._names[name]
                await self.release_deleted()
            raise UnknownSoftPrompt(name) from error
        except SoftPromptError as error:
            failure = SoftPromptOfAnotherModel if error.code == "wrong_model" else UnusableSoftPrompt
            raise failure(f"soft prompt {name!r}: {error}", param="soft_prompt", code=error.code) from error
        except OSError as error:
            logger.exception("no file for the requests that use the soft prompt %s", name)
            raise storage_failure(error) from error
        path = self._leased[stored.sha256]
        manifest = stored.manifest
        has_keys = manifest.kind == "kv"
        return Lease(stored, SoftPromptRef(stored.sha256, str(path), manifest.num_virtual_tokens, has_keys=has_keys))

    def release(self, lease: Lease) -> None:
        self._release(lease.stored.sha256)

    def names_of(self, hashes: Collection[str]) -> list[str]:
        """Names that requests have used for soft prompts with these content hashes."""
        return [name for name, sha256 in self._names.items() if sha256 in hashes]

    async def release_deleted(self) -> None:
        """Drop the files of soft prompts that the store has under no name any more, once no request uses them.

        Others change the store too, so this runs whenever it is seen to have changed. Where the store cannot be listed
        they stay until the next time: whoever asks for something else should not fail over that.
        """
        change, leased = self._store.changed_at(), set(self._seen)
        try:
            registered = {stored.sha256 for stored in await asyncio.to_thread(self._store.list)}
        except OSError as error:
            logger.warning("files of deleted soft prompts are kept for now: %s", error.strerror or error)
            return
        self._seen_change = change
        for sha256 in leased - registered:
            self._retired.add(sha256)
            self._drop_unused(sha256)

    async def _hold(self, name: str) -> StoredPrompt:
        """As the name leads between looking and linking: a preview may be swapped for the trained one meanwhile."""
        for _ in range(_TRIES):
            stored = await asyncio.to_thread(self._store.get, name)
            with contextlib.suppress(UnknownPrompt, FileNotFoundError):
                return await self._hold_file(name, stored)
        raise UnknownPrompt(name)

    async def _hold_file(self, name: str, stored: StoredPrompt) -> StoredPrompt:
        """Counts one more user of the soft prompt's leased file, linking it first when it is not there yet."""
        # Counted before the file is linked, so that `release_deleted` meanwhile cannot take it away.
        self._users[stored.sha256] += 1
        try:
            if stored.sha256 not in self._leased:
                check_fits(stored.manifest, self._spec)
                self._leased[stored.sha256] = await asyncio.to_thread(self._store.lease, stored, self._directory)
                self._seen.add(stored.sha256)
                if self._may_have_changed(name, stored.sha256):
                    await self.release_deleted()
            self._names[name] = stored.sha256
        except BaseException:
            self._release(stored.sha256)
            raise
        return stored

    def _may_have_changed(self, name: str, sha256: str) -> bool:
        """Whether names may have come or gone since the last `release_deleted`, which reads the whole store: a server
        that gets to know its soft prompts one after the other should not do that each time."""
        changed = self._store.changed_at()
        fresh = time.time_ns() - changed < DIRECTORY_TIME_NS
        return self._names.get(name, sha256) != sha256 or changed != self._seen_change or fresh

    def _release_held(self, holding: asyncio.Future[StoredPrompt]) -> None:
        if not holding.cancelled() and holding.exception() is None:
            self._release(holding.result().sha256)

    def _release(self, sha256: str) -> None:
        self._users[sha256] -= 1
        self._drop_unused(sha256)

    def _drop_unused(self, sha256: str) -> None:
        if self._users[sha256]:
            return
        del self._users[sha256]
        if sha256 in self._retired or not self._store.keeps_leases:
            path = self._leased.pop(sha256, None)
            if path is not None:
                path.unlink(missing_ok=True)
        if sha256 in self._retired:
            self._retired.discard(sha256)
            self._seen.discard(sha256)
            self._on_unused(sha256)
