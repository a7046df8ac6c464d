"""The small object that gives a soft prompt its name in a bucket: written once, refused if a bit is wrong."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import msgspec
from pydantic import ValidationError

from softbatch.prompt_store.manifest import Manifest, SoftPromptError

FORMAT_VERSION = 1
NAMES = "prompts/"
_SUFFIX = ".json"


class PromptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`nonce` tells this registration from every other of the name, and is part of its objects' keys; `previous` is
    that of the one whose place it takes, if any."""

    name: str
    sha256: str
    num_bytes: int
    manifest: dict[str, Any]
    created_at: int
    nonce: str
    text_sha256: str | None = None
    text_bytes: int = 0
    recall: int | None = None
    previous: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def key(self) -> str:
        """Of the content."""
        return content_key(self.name, self.sha256, self.nonce)

    @property
    def text_key(self) -> str:
        return f"texts/{self.name}/{self.text_sha256}-{self.nonce}{_SUFFIX}"

    def parsed_manifest(self) -> Manifest:
        """Raises SoftPromptError."""
        try:
            return Manifest.model_validate(self.manifest)
        except ValidationError:
            raise _damaged(self.name, "its manifest cannot be read") from None


def new_nonce() -> str:
    return secrets.token_hex(7)  # below 2**63 as a number


def content_key(name: str, sha256: str, nonce: str) -> str:
    return f"objects/{name}/{sha256}-{nonce}.safetensors"


def name_and_nonce(key: str) -> tuple[str, str] | None:
    """Of a content's or a text's key."""
    parts = key.split("/")
    if len(parts) != 3 or parts[0] not in ("objects", "texts"):
        return None
    return parts[1], parts[2].partition(".")[0].rpartition("-")[2]


def record_key(name: str) -> str:
    return f"{NAMES}{name}{_SUFFIX}"


def name_of(key: str) -> str | None:
    if key.startswith(NAMES) and key.endswith(_SUFFIX):
        return key.removeprefix(NAMES).removesuffix(_SUFFIX)
    return None


def seal(content: bytes) -> bytes:
    """With its own SHA-256 in front, so that a damaged or a half-written one is known."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unseal(sealed: bytes) -> bytes:
    """Raises ValueError."""
    sha256, _, content = sealed.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != sha256:
        raise ValueError("its SHA-256 is another than it says")
    return content


def read_record(name: str, sealed: bytes) -> PromptRecord:
    """Raises SoftPromptError."""
    try:
        record = msgspec.json.decode(unseal(sealed), type=PromptRecord)
    except (ValueError, msgspec.MsgspecError) as error:
        raise _damaged(name, str(error)) from None
    if record.name != name:
        raise _damaged(name, f"it is the record of {record.name[:128]}")
    if record.format_version != FORMAT_VERSION:
        raise _damaged(name, f"it has format {record.format_version}; this server reads format {FORMAT_VERSION}")
    return record


def _damaged(name: str, reason: str) -> SoftPromptError:
    return SoftPromptError(
        f"the record {record_key(name)} in the bucket is damaged: {reason}", param="file", code="invalid_file"
    )
