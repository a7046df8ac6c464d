"""What a soft prompt says about itself, and the errors it is refused with. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 20
MAX_VIRTUAL_TOKENS = 65536
PREVIEW_OF = "preview_of"  # in `training`, which servers of older code read too
KINDS = ("embeddings", "kv")
Replaces = Literal["nothing", "system"]
# Leaves room in the header for the tensor table.
_MAX_MANIFEST_BYTES = MAX_HEADER_BYTES - 4096

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Scalar = bool | int | float | Annotated[str, Field(max_length=4096)] | None


class SoftPromptError(ValueError):
    """A soft prompt that cannot be used. `param` names the field at fault and `code` is stable for programs:
    invalid_file, invalid_manifest, unsupported_version, unknown_kind, unsupported_adapter, wrong_tensors,
    wrong_shape, wrong_dtype, non_finite, too_large, wrong_model, invalid_name, name_taken, name_changed,
    unknown_prompt."""

    def __init__(self, message: str, *, param: str, code: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class ModelSpec:
    """The model a soft prompt must fit; `fingerprint` comes from `soft_prompt.fingerprint`."""

    name: str
    fingerprint: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelRef(_Frozen):
    """The model the soft prompt was trained for."""

    name: str = Field(min_length=1, max_length=256)
    fingerprint: Sha256


class ContextRef(_Frozen):
    """The context that was compressed: the hash of its UTF-8 text and its length in tokens."""

    sha256: Sha256
    num_tokens: int = Field(ge=1, le=100_000_000)


class Manifest(_Frozen):
    """The description stored in the header of a soft prompt file; always small enough to be saved again.

    `replaces` is 'system' when the virtual tokens stand for tokens 0 to n-1 (BOS, system turn and context),
    and 'nothing' when they stand before BOS and everything else, as PEFT trains them. `created_at` is in Unix
    seconds.
    """

    format_version: Literal[1] = 1
    kind: Literal["embeddings", "kv"]
    num_virtual_tokens: int = Field(ge=1, le=MAX_VIRTUAL_TOKENS)
    model: ModelRef
    replaces: Replaces
    context: ContextRef | None = None
    objective: Literal["nll", "kl", "mixed"] | None = None
    source: str = Field(min_length=1, max_length=256)
    created_at: int = Field(ge=0, le=253_402_300_799)
    training: dict[Annotated[str, Field(max_length=128)], _Scalar] = Field(default={}, max_length=128)
    fidelity: dict[Annotated[str, Field(max_length=128)], JsonValue] = Field(default={}, max_length=1024)

    @property
    def preview_of(self) -> str | None:
        """The compression whose preview this is; None for what is no preview."""
        found = self.training.get(PREVIEW_OF)
        return found if isinstance(found, str) else None

    @model_validator(mode="after")
    def _is_bounded(self) -> Manifest:
        for field in ("training", "fidelity"):
            for number in _numbers(getattr(self, field)):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{field} holds NaN or an infinite number; every number must be finite")
                if isinstance(number, int) and not -(2**63) <= number < 2**63:
                    raise ValueError(f"{field} holds an integer of more than 64 bits")
        # Escaped once more inside the header, a quote or backslash takes two bytes.
        text = self.model_dump_json()
        num_bytes = len(text.encode()) + text.count('"') + text.count("\\")
        if num_bytes > _MAX_MANIFEST_BYTES:
            raise ValueError(f"takes {num_bytes} bytes in the header; at most {_MAX_MANIFEST_BYTES} are allowed")
        return self


def parse_manifest(text: str) -> Manifest:
    """Read the JSON a file carries. Raises SoftPromptError invalid_manifest, unsupported_version or
    unknown_kind."""
    try:
        raw: Any = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise SoftPromptError(
            f"the manifest is not valid JSON: {error}", param="manifest", code="invalid_manifest"
        ) from None
    if not isinstance(raw, dict):
        raise SoftPromptError("the manifest must be a JSON object", param="manifest", code="invalid_manifest")
    version = raw.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise SoftPromptError(
            f"format_version {_shown(version)} is not known; this server reads version {FORMAT_VERSION}",
            param="format_version",
            code="unsupported_version",
        )
    kind = raw.get("kind")
    if kind not in KINDS:
        raise SoftPromptError(
            f"kind {_shown(kind)} is not known; it must be one of {', '.join(KINDS)}",
            param="kind",
            code="unknown_kind",
        )
    try:
        return Manifest.model_validate(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:256] or "manifest"
        raise SoftPromptError(f"{field}: {first['msg']}", param=field, code="invalid_manifest") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value
