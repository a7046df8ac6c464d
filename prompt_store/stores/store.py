"""What every store of soft prompts offers, wherever it keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from softbatch.prompt_store.manifest import Manifest, ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.kept_text import KeptText

Version = tuple[int, ...]


class NameTaken(SoftPromptError):
    """Another soft prompt has this name."""

    CODE = "name_taken"

    def __init__(self, name: str) -> None:
        super().__init__(f"a soft prompt named '{name}' exists already", param="name", code=self.CODE)


class UnknownPrompt(SoftPromptError):
    """No soft prompt has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no soft prompt named '{name[:128]}'", param="soft_prompt", code="unknown_prompt")


class NameChanged(SoftPromptError):
    """The name does not lead any more to the soft prompt whose place another was to take."""

    CODE = "name_changed"

    def __init__(self, name: str, is_gone: bool) -> None:
        what = "was deleted meanwhile" if is_gone else "is another one by now"
        super().__init__(f"the soft prompt named '{name}' {what}", param="name", code=self.CODE)
        self.is_gone = is_gone


@dataclass(frozen=True)
class StoredPrompt:
    """A registered soft prompt. `sha256` is over the file's bytes and is its identity in every cache.

    `created_at` is when it was registered, in Unix seconds. `path` is where the file lies on this machine once
    `local_file` was called.
    `version` differs between any two files that ever had the name. `recall` is how many passages of its kept text a
    request gets that does not say; None: no text is kept.
    """

    name: str
    path: Path
    sha256: str
    num_bytes: int
    manifest: Manifest
    created_at: int
    version: Version = field(repr=False)
    recall: int | None = None


class SoftPromptStore(Protocol):
    """Names and their soft prompts. Adding, swapping and removing are atomic; nothing else changes where a name leads.

    Any number of processes may share one store. Methods may block; they are thread-safe.
    """

    max_bytes: int  # the size of the largest file that can be added
    root: Path  # on this machine's disk, where leases and work lie
    location: str  # what users call the store
    keeps_leases: bool  # a lease that nobody uses costs nothing, as the store has the file anyway

    def check_free(self, name: str) -> None:
        """A cheap check before an upload; `add` decides. Raises SoftPromptError invalid_name, or NameTaken."""
        ...

    def add(self, name: str, file: Path, spec: ModelSpec | None = None, kept: KeptText | None = None) -> StoredPrompt:
        """Register a copy of `file` after checking all of it, and that it fits `spec`; keep its text beside it.

        Raises NameTaken, or SoftPromptError: invalid_name, or what `load`, `check_fits` and `check_kept` raise."""
        ...

    def swap(self, name: str, previous: str, file: Path, kept: KeptText | None = None) -> StoredPrompt:
        """`add`, in the place of the soft prompt with the SHA-256 `previous`: at every moment the name leads to one of
        the two. Raises NameChanged, and leaves the name alone, if it leads elsewhere; and what `add` raises."""
        ...

    def get(self, name: str) -> StoredPrompt:
        """Cheap for a prompt that was asked for before. Raises UnknownPrompt, or SoftPromptError if it is broken."""
        ...

    def is_known(self, name: str) -> bool:
        """Whether the name is given away, as far as this process can tell without waiting. Never raises."""
        ...

    def local_file(self, stored: StoredPrompt) -> Path:
        """Where its content can be read on this machine now. Raises like `lease`."""
        ...

    def sweep(self) -> None:
        """Remove, in time, what crashes have left behind. Returns at once."""
        ...

    def kept_text(self, stored: StoredPrompt) -> KeptText | None:
        """The text for recall. None where none is kept. Raises SoftPromptError where it is damaged, by its name, and
        UnknownPrompt if the soft prompt is gone."""
        ...

    def open(self, name: str) -> tuple[StoredPrompt, BinaryIO]:
        """The very file that is described, whole even if it is removed meanwhile. Raises like `get`."""
        ...

    def list(self) -> Sequence[StoredPrompt]:
        """All usable soft prompts, sorted by name."""
        ...

    def broken(self) -> Sequence[tuple[str, str]]:
        """(name, reason) of everything in the store that is no usable soft prompt, sorted by name."""
        ...

    def changed_at(self) -> int:
        """When a name last came or went, in Unix nanoseconds, as exactly as the store can tell. Cheap."""
        ...

    def remove(self, name: str, only: str | None = None) -> None:
        """Release the name; leases keep the content. Raises UnknownPrompt; with `only`, the SHA-256 that it must lead
        to, NameChanged."""
        ...

    def export(self, name: str, path: Path) -> None:
        """Copy the file to `path` in one step. Raises UnknownPrompt."""
        ...

    def lease(self, stored: StoredPrompt, directory: Path) -> Path:
        """A file in `directory` with this very content, which stays when the name is removed.

        The caller owns the directory and deletes from it. Raises UnknownPrompt if the content is already gone."""
        ...
