"""The store that is a directory: one `<name>.safetensors` per soft prompt, and the texts that some keep."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from softbatch.prompt_store.atomic_files import lock, replacing, sync
from softbatch.prompt_store.names import check_name, is_name
from softbatch.prompt_store.soft_prompt_file import (
    Manifest,
    ModelSpec,
    SoftPromptError,
    check_file,
    read_manifest,
)
from softbatch.prompt_store.stores.bounded_copy import NO_LINK, copy_bounded
from softbatch.prompt_store.stores.kept_text import DIRECTORY as TEXTS
from softbatch.prompt_store.stores.kept_text import KeptText, KeptTexts
from softbatch.prompt_store.stores.store import NameChanged as NameChanged
from softbatch.prompt_store.stores.store import NameTaken as NameTaken
from softbatch.prompt_store.stores.store import SoftPromptStore, Version
from softbatch.prompt_store.stores.store import StoredPrompt as StoredPrompt
from softbatch.prompt_store.stores.store import UnknownPrompt as UnknownPrompt
from softbatch.prompt_store.stores.unfinished import new_unfinished, remove_unfinished

_SUFFIX = ".safetensors"
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY
_TRIES = 5  # to open a file whose name others give away meanwhile


class PromptStore(SoftPromptStore):
    """The directory is the only state, so any number of processes and hosts may share it.

    A file appears whole (by link), takes another's place (by rename) and goes (by unlink). `max_bytes` bounds each
    file. Adding needs a file system with hard links.
    """

    keeps_leases = True

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.location = root, str(root)
        self.max_bytes = max_bytes
        self._cache: dict[str, tuple[Version, StoredPrompt | SoftPromptError]] = {}
        root.mkdir(parents=True, exist_ok=True)
        self._texts = KeptTexts(root / TEXTS)
        remove_unfinished(root)
        self._texts.remove_stale(lambda name: self._path(name).exists())

    def check_free(self, name: str) -> None:
        check_name(name)
        if os.path.lexists(self._path(name)):
            raise NameTaken(name)

    def add(self, name: str, file: Path, spec: ModelSpec | None = None, kept: KeptText | None = None) -> StoredPrompt:
        self.check_free(name)
        with self._checked_copy(file, spec) as (temp, sha256, manifest):
            with self._kept_with(name, sha256, kept):
                try:
                    os.link(temp, self._path(name))
                except FileExistsError:
                    raise NameTaken(name) from None
            return self._registered(name, sha256, manifest, temp.stat())

    def swap(self, name: str, previous: str, file: Path, kept: KeptText | None = None) -> StoredPrompt:
        """The text of the one before stays until the name goes: requests that still use that one may recall it."""
        check_name(name)
        with self._checked_copy(file, None) as (temp, sha256, manifest):
            found = temp.stat()
            with self._kept_with(name, sha256, kept), self._alone():
                self._check_leads_to(name, previous)
                temp.replace(self._path(name))
            return self._registered(name, sha256, manifest, found)

    @contextlib.contextmanager
    def _checked_copy(self, file: Path, spec: ModelSpec | None) -> Iterator[tuple[Path, str, Manifest]]:
        """Under a temporary name, until the end of the block."""
        temp = new_unfinished(self.root)
        try:
            # Read-only, because leases share the file's content.
            with file.open("rb") as source, open(os.open(temp, _CREATE, 0o444), "wb") as target:
                sha256 = copy_bounded(source, target, self.max_bytes)
            yield temp, sha256, check_file(temp, self.max_bytes, spec)
        finally:
            temp.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _kept_with(self, name: str, sha256: str, kept: KeptText | None) -> Iterator[None]:
        """The text is there before the block gives the name, and goes again if that fails."""
        is_kept = kept is not None and self._texts.add(name, sha256, kept)
        try:
            yield
        except BaseException:
            if is_kept:
                self._texts.remove(name, sha256)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process swaps or removes meanwhile, if the file system has locks. Adding needs none: it never takes
        a name that is there."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    def _check_leads_to(self, name: str, sha256: str) -> None:
        """Raises NameChanged."""
        try:
            is_same = self.get(name).sha256 == sha256
        except UnknownPrompt:
            raise NameChanged(name, is_gone=True) from None
        except SoftPromptError:
            is_same = False
        if not is_same:
            raise NameChanged(name, is_gone=False)

    def _registered(self, name: str, sha256: str, manifest: Manifest, found: os.stat_result) -> StoredPrompt:
        sync(self.root)
        stored = self._stored(name, sha256, manifest, found)
        self._cache[name] = (stored.version, stored)
        return stored

    def get(self, name: str) -> StoredPrompt:
        """One stat if the file is known; otherwise its header and hash are read."""
        if not is_name(name):
            raise UnknownPrompt(name)
        for _ in range(_TRIES):
            version = self._version(name)
            cached = self._cache.get(name)
            if cached is None or cached[0] != version:
                found = self._read(name, version)
                if found is None:
                    continue  # it took another's place meanwhile, or somebody writes to it
                cached = self._cache[name] = (version, found)
            if isinstance(cached[1], SoftPromptError):
                raise SoftPromptError(str(cached[1]), param=cached[1].param, code=cached[1].code)
            return cached[1]
        raise SoftPromptError("the file is being written", param="file", code="invalid_file")

    def _version(self, name: str) -> Version:
        """Raises UnknownPrompt, or SoftPromptError for a name that leads nowhere."""
        path = self._path(name)
        try:
            return _version_of(path.stat())
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

    def remove(self, name: str, only: str | None = None) -> None:
        if not is_name(name):
            raise UnknownPrompt(name)
        with self._alone():
            if only is not None:
                self._check_leads_to(name, only)
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
        _, file = self.open(name)
        with file, replacing(path) as temp, temp.open("xb") as target:
            copy_bounded(file, target, self.max_bytes)
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

    def _read(self, name: str, version: Version) -> StoredPrompt | SoftPromptError | None:
        """None for a file of another version by now."""
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
        return self._stored(name, sha256, manifest, opened) if unchanged else None

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


def _version_of(found: os.stat_result) -> Version:
    """What tells a file from any that had its name before."""
    if not stat.S_ISREG(found.st_mode):
        return (0, 0, 0, 0)
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
