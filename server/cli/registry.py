"""Where a new soft prompt is registered: a store on this machine, or a running server."""

from __future__ import annotations

import hashlib
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.prompt_store.names import is_name
from softbatch.prompt_store.stores.store import NameTaken, SoftPromptStore
from softbatch.server.cli.server_client import ServerClient
from softbatch.server.cli.settings_flags import UsageError

if TYPE_CHECKING:
    from softbatch.server.compressions.result import Finished


class Registry(Protocol):
    """Raises UsageError or SoftPromptError."""

    def max_bytes(self) -> int:
        """Of a soft prompt's file."""
        ...

    def check_free(self, name: str) -> None: ...

    def check_model(self, name: str, spec: ModelSpec) -> None: ...

    def holds(self, name: str, file: Path) -> bool:
        """Whether the name leads to this very file, if there is one."""
        ...

    def add(self, name: str, finished: Finished, preview: str | None = None) -> None:
        """In the place of the registered preview with this SHA-256, if there is one; once more does no harm."""
        ...


class LocalRegistry:
    def __init__(self, store: SoftPromptStore) -> None:
        self._store = store

    def max_bytes(self) -> int:
        return self._store.max_bytes

    def check_free(self, name: str) -> None:
        self._store.check_free(name)

    def check_model(self, name: str, spec: ModelSpec) -> None:
        """A store takes the soft prompts of any model."""

    def holds(self, name: str, file: Path) -> bool:
        from softbatch.server.compressions.result import sha256_of_file

        return self._store.get(name).sha256 == sha256_of_file(file)

    def add(self, name: str, finished: Finished, preview: str | None = None) -> None:
        from softbatch.server.compressions.result import register_own

        register_own(self._store, name, finished, preview)


class RemoteRegistry:
    def __init__(self, client: ServerClient) -> None:
        self._client = client

    @cached_property
    def _info(self) -> dict[str, Any]:
        return self._client.call("GET", "/info")[1]

    def max_bytes(self) -> int:
        limit = self._info.get("max_soft_prompt_bytes")
        return limit if isinstance(limit, int) else sys.maxsize  # an older server does not say

    def check_free(self, name: str) -> None:
        if not is_name(name):
            raise UsageError("--name: use 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit")
        if self._sha256(name) is not None:
            raise NameTaken(name)
        if self._info.get("model_id") == name:
            raise UsageError(_is_the_model(name))
        self._client.call("GET", "/v1/compressions")  # what registers a soft prompt may do this too

    def check_model(self, name: str, spec: ModelSpec) -> None:
        info = self._info
        if info.get("model_fingerprint") != spec.fingerprint:
            raise UsageError(
                f"--model: the server runs {info.get('model_id')}, which is another model than {spec.name}; "
                "compress with the model that will serve the soft prompt"
            )

    def holds(self, name: str, file: Path) -> bool:
        return False  # a server's previews are of its own compressions

    def add(self, name: str, finished: Finished, preview: str | None = None) -> None:
        """Uploads take no other's place."""
        if self._sha256(name) != hashlib.sha256(finished.prompt.read_bytes()).hexdigest():
            self._client.upload("/v1/soft_prompts", name, finished.prompt, finished.kept)

    def _sha256(self, name: str) -> str | None:
        status, found = self._client.call("GET", f"/v1/soft_prompts/{name}", expected=(200, 404))
        return str(found["sha256"]) if status == 200 else None


def _is_the_model(name: str) -> str:
    return f"--name: {name} is the model's own name; choose another one"
