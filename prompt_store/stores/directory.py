"""The store that is a directory: one `<name>.safetensors` per soft prompt, and the texts that some keep."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from softbatch.prompt_store.atomic_files import replacing, sync
from softbatch.prompt_store.names import check_name, is_name
from softbatch.prompt_store.soft_prompt_file import (
    Manifest,
    ModelSpec,
    SoftPromptError,
    check_fits,
    load,
    read_manifest,
)
from softbatch.prompt_store.stores.bounded_copy import NO_LINK, copy_bounded
from softbatch.prompt_store.stores.kept_text import DIRECTORY as TEXTS
from softbatch.prompt_store.stores.kept_text import KeptText, KeptTexts
from softbatch.prompt_store.stores.store import NameTaken as NameTaken
from softbatch.prompt_store.stores.store import SoftPromptStore, Version
from softbatch.prompt_store.stores.store import StoredPrompt as StoredPrompt
from softbatch.prompt_store.stores.store import UnknownPrompt as UnknownPrompt

_SUFFIX = ".safetensors"
# A dot at the start: no prompt name begins with one, so a temporary file is never listed.
_TEMP = re.compile(r"\.add-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,7})-[0-9a-f]{16}")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_STALE_SECONDS = 3600
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY
_TRIES = 5  # to open a file whose name others give away meanwhile


class PromptStore(SoftPromptStore):
    """The directory is the only state, so any number of processes and hosts may share it.

    A file appears whole (by link) and goes (by unlink). `max_bytes` bounds each file. Adding needs a file system with
    hard links.
    """

    keeps_leases = True

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.location = root, str(root)
        self.max_bytes = max_bytes
        self._cache: dict[str, tuple[Version, StoredPrompt | SoftPromptError]] = {}
        root.mkdir(parents=True, exist_ok=True)
        self._texts = KeptTexts(root / TEXTS)
        self._remove_stale_temps()
        self._texts.remove_stale(lambda name: self._path(name).exists())

    def check_free(self, name: str) -> None:
        check_name(name)
        if os.path.lexists(self._path(name)):
            raise NameTaken(name)

    def add(self, name: str, file: Path, spec: ModelSpec | None = None, kept: KeptText | None = None) -> StoredPrompt:
        self.check_free(name)
        temp = self.root / f".add-{_HOST}-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            # Read-only, because leases share the file's content.
            with file.open("rb") as source, open(os.open(temp, _CREATE, 0o444), "wb") as target:
                sha256 = copy_bounded(source, target, self.max_bytes)
            prompt = load(temp, self.max_bytes)
            if spec is not None:
                check_fits(prompt, spec)
            is_kept = kept is not None and self._texts.add(name, sha256, kept)
            try:
                os.link(temp, self._path(name))
            except OSError as error:
                if is_kept:
                    self._texts.remove(name, sha256)
                if isinstance(error, FileExistsError):
                    raise NameTaken(name) from None
                raise
            sync(self.root)
            stored = self._stored(name, sha256, prompt.manifest, temp.stat())
        finally:
            temp.unlink(missing_ok=True)
        self._cache[name] = (stored.version, stored)
        return stored

    def get(self, name: str) -> StoredPrompt:
        """One stat if the file is known; otherwise its header and hash are read."""
        if not is_name(name):
            raise UnknownPrompt(name)
        path = self._path(name)
        try:
            version = _version_of(path.stat())
        except OSError as error:
            self._cache.pop(name, None)
            is_missing = isinstance(error, FileNotFoundError)
            # Not whether anything is there: another may have been registered under the name just now.
            if path.is_symlink() or (not is_missing and os.path.lexists(path)):
                reason = "a link to nothing" if is_missing else error.strerror
                raise SoftPromptError(f"the file cannot be read: {reason}", param="file", code="invalid_file") from None
            if is_missing:
                raise UnknownPrompt(name) from None
            raise
        cached = self._cache.get(name)
        if cached is None or cached[0] != version:
            cached = (version, self._read(name, version))
            self._cache[name] = cached
        found = cached[1]
        if isinstance(found, SoftPromptError):
            raise SoftPromptError(str(found), param=found.param, code=found.code)
        return found

    def kept_text(self, stored: StoredPrompt) -> KeptText | None:
        return self._texts.read(stored.name, stored.sha256)

    def open(self, name: str) -> tuple[StoredPrompt, BinaryIO]:
        for _ in range(_TRIES):
            stored = self.get(name)
            try:
                file = stored.path.open("rb")
            except FileNotFoundError:
                continue  # removed meanwhile, or another has the name by now
            if _version_of(os.fstat(file.fileno())) == stored.version:
                return stored, file
            file.close()
        raise UnknownPrompt(name)

    def list(self) -> Sequence[StoredPrompt]:
        return [found for _, found in self._scan() if isinstance(found, StoredPrompt)]

    def broken(self) -> Sequence[tuple[str, str]]:
        return [(name, str(found)) for name, found in self._scan() if isinstance(found, SoftPromptError)]

    def changed_at(self) -> int:
        return self.root.stat().st_mtime_ns

    def remove(self, name: str) -> None:
        if not is_name(name):
            raise UnknownPrompt(name)
        self._texts.remove(name)
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            raise UnknownPrompt(name) from None
        except OSError:
            if self._path(name).is_dir():
                message = "a directory has this name; only whoever runs the server can remove it"
                raise SoftPromptError(message, param="name", code="invalid_file") from None
            raise
        finally:
            self._cache.pop(name, None)
        sync(self.root)

    def export(self, name: str, path: Path) -> None:
        stored = self.get(name)
        with replacing(path) as temp:
            self._copy_content(stored, temp)
        sync(path.parent)

    def local_file(self, stored: StoredPrompt) -> Path:
        return stored.path

    def sweep(self) -> None:
        """Done when it was opened: there is little to look through."""

    def is_known(self, name: str) -> bool:
        return is_name(name) and os.path.lexists(self._path(name))

    def lease(self, stored: StoredPrompt, directory: Path) -> Path:
        """A hard link if possible, otherwise a copy, named `<sha256>.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"{stored.sha256}{_SUFFIX}"
        if target.exists():
            return target
        with replacing(target) as temp:
            try:
                os.link(stored.path.resolve(), temp)
            except FileNotFoundError:
                raise UnknownPrompt(stored.name) from None
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                self._copy_content(stored, temp)
            else:
                if _version_of(temp.stat()) != stored.version:
                    raise UnknownPrompt(stored.name)
        return target

    def _path(self, name: str) -> Path:
        return self.root / f"{name}{_SUFFIX}"

    def _scan(self) -> Iterator[tuple[str, StoredPrompt | SoftPromptError]]:
        entries = (entry.name for entry in os.scandir(self.root))
        names = sorted(name.removesuffix(_SUFFIX) for name in entries if name.endswith(_SUFFIX) and name[0] != ".")
        for gone in set(self._cache) - set(names):
            self._cache.pop(gone, None)
        for name in names:
            try:
                check_name(name)
                yield name, self.get(name)
            except UnknownPrompt:
                continue  # removed meanwhile
            except SoftPromptError as error:
                yield name, error

    def _read(self, name: str, version: Version) -> StoredPrompt | SoftPromptError:
        path = self._path(name)
        try:
            manifest = read_manifest(path, self.max_bytes)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                opened = os.fstat(file.fileno())
            unchanged = version == _version_of(opened) == _version_of(path.stat())
        except SoftPromptError as error:
            return error
        except FileNotFoundError:
            raise UnknownPrompt(name) from None
        except OSError:
            return SoftPromptError("the file cannot be read", param="file", code="invalid_file")
        if not unchanged:
            return SoftPromptError("the file is being written", param="file", code="invalid_file")
        return self._stored(name, sha256, manifest, opened)

    def _stored(self, name: str, sha256: str, manifest: Manifest, found: os.stat_result) -> StoredPrompt:
        kept = self._texts.read(name, sha256)
        created, recall = int(found.st_mtime), None if kept is None else kept.recall
        path, version = self._path(name), _version_of(found)
        return StoredPrompt(name, path, sha256, found.st_size, manifest, created, version, recall)

    def _copy_content(self, stored: StoredPrompt, target: Path) -> None:
        try:
            with stored.path.open("rb") as source, target.open("xb") as copy:
                sha256 = copy_bounded(source, copy, self.max_bytes)
        except FileNotFoundError:
            raise UnknownPrompt(stored.name) from None
        if sha256 != stored.sha256:
            raise UnknownPrompt(stored.name)

    def _remove_stale_temps(self) -> None:
        for path in self.root.iterdir():
            owner = _TEMP.fullmatch(path.name)
            with contextlib.suppress(OSError):
                if owner and (_is_dead(owner) or time.time() - path.stat().st_mtime > _STALE_SECONDS):
                    path.unlink()


def _version_of(found: os.stat_result) -> Version:
    """What tells a file from any that had its name before."""
    if not stat.S_ISREG(found.st_mode):
        return (0, 0, 0, 0)
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def _is_dead(owner: re.Match[str]) -> bool:
    if owner["host"] != _HOST:
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False
