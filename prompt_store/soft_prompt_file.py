"""A soft prompt: its tensors, its manifest and the one `.safetensors` file both live in."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from softbatch.prompt_store.atomic_files import replacing, sync
from softbatch.prompt_store.fingerprint import fingerprint
from softbatch.prompt_store.finite_numbers import first_non_finite
from softbatch.prompt_store.manifest import (
    MAX_HEADER_BYTES,
    ContextRef,
    Manifest,
    ModelRef,
    ModelSpec,
    SoftPromptError,
    parse_manifest,
)

if TYPE_CHECKING:  # a header is read without torch, so that listing a store takes no time
    import torch

__all__ = [
    "ContextRef",
    "Manifest",
    "ModelRef",
    "ModelSpec",
    "SoftPrompt",
    "SoftPromptError",
    "check_file",
    "check_fits",
    "fingerprint",
    "load",
    "read_manifest",
    "save",
]

_HEADER_KEY = "softbatch"
_TENSOR_NAMES = {"embeddings": ("embeddings",), "kv": ("keys", "values")}
_DTYPES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Tensors that agree with their manifest: a SoftPrompt that exists is valid.

    Kind `embeddings`: `embeddings` [n, hidden], as they enter the model as `inputs_embeds`. Kind `kv`:
    `keys` and `values` [layers, n, kv_heads, head_dim], as they enter the cache (keys already turned,
    for questions that begin at position n). Raises SoftPromptError.
    """

    manifest: Manifest
    embeddings: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tensors = self.tensors
        _check_layout(self.manifest, {name: (t.shape, str(t.dtype)) for name, t in tensors.items()})
        for name, tensor in tensors.items():
            if not _all_finite(tensor):
                raise _non_finite(name, (~tensor.isfinite()).nonzero()[0].tolist())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of this kind, by their name in the file."""
        named = {"embeddings": self.embeddings, "keys": self.keys, "values": self.values}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _all_finite(tensor: torch.Tensor) -> bool:
    """By its extremes, which are NaN where there is one: one pass, without a tensor of answers. In parts so small that
    torch stays in this thread: beside a running step a second team of threads waits long for its turn."""
    parts = tensor.flatten().split(1 << 14)
    return all(math.isfinite(extreme) for part in parts for extreme in map(float, part.aminmax()))


def save(prompt: SoftPrompt, path: Path) -> None:
    """Write the file in one step: whoever opens `path` sees either the old content or all of the new, even
    after a crash."""
    from safetensors.torch import save_file

    # Clones: safetensors refuses two tensors that share memory, as views of one KV tensor do.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in prompt.tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_HEADER_KEY: prompt.manifest.model_dump_json()})
        except SafetensorError as error:  # which has the system's error in its text alone
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
            raise
        sync(temporary)
    sync(path.parent)


def load(path: Path, max_bytes: int) -> SoftPrompt:
    """Read and check a whole file. The tensors own their memory, so the file may vanish afterwards.

    Raises SoftPromptError, or OSError when there is no such file.
    """
    with _open(path, max_bytes, "pt") as file:
        manifest = _manifest_of(file)
        tensors = {name: file.get_tensor(name).clone() for name in _TENSOR_NAMES[manifest.kind]}
    return SoftPrompt(manifest, **tensors)


def read_manifest(path: Path, max_bytes: int) -> Manifest:
    """Read and check the header alone: manifest, tensor names, shapes, dtypes and the file's length.

    Raises SoftPromptError, or OSError when there is no such file.
    """
    with _open(path, max_bytes, "np") as file:
        return _manifest_of(file)


def check_file(path: Path, max_bytes: int, spec: ModelSpec | None = None) -> Manifest:
    """Check a whole file as `load` does, and then whether it fits `spec`, without torch: who only keeps files never
    imports it.

    Raises SoftPromptError, or OSError when there is no such file.
    """
    with _open(path, max_bytes, "np") as file:
        manifest = _manifest_of(file)
        shapes = {name: list(file.get_slice(name).get_shape()) for name in _TENSOR_NAMES[manifest.kind]}
    for name, shape in shapes.items():
        if (where := first_non_finite(path, name, shape)) is not None:
            raise _non_finite(name, where)
    if spec is not None:
        check_fits(manifest, spec)
        _check_sizes(manifest, *next(iter(shapes.items())), spec)
    return manifest


def check_fits(prompt: Manifest | SoftPrompt, spec: ModelSpec) -> None:
    """Refuse a prompt made for another model; a manifest alone knows no tensor sizes, so those go unchecked.

    Raises SoftPromptError wrong_model or wrong_shape, naming both sides.
    """
    manifest = prompt.manifest if isinstance(prompt, SoftPrompt) else prompt
    if manifest.model.fingerprint != spec.fingerprint:
        raise SoftPromptError(
            f"the soft prompt was made for model {manifest.model.name} (fingerprint "
            f"{manifest.model.fingerprint[:12]}), but this server runs {spec.name} (fingerprint "
            f"{spec.fingerprint[:12]}); train it again on this model",
            param="model.fingerprint",
            code="wrong_model",
        )
    if isinstance(prompt, SoftPrompt):
        name, tensor = next(iter(prompt.tensors.items()))
        _check_sizes(manifest, name, tensor.shape, spec)


def _check_sizes(manifest: Manifest, name: str, shape: Sequence[int], spec: ModelSpec) -> None:
    if manifest.kind == "embeddings":
        expected = {"hidden size": (1, spec.hidden_size)}
    else:
        expected = {
            "layers": (0, spec.num_layers),
            "kv heads": (2, spec.num_kv_heads),
            "head_dim": (3, spec.head_dim),
        }
    for what, (axis, wanted) in expected.items():
        if shape[axis] != wanted:
            raise SoftPromptError(
                f"{what}: tensor {name} has {shape[axis]}, but model {spec.name} has {wanted}",
                param=name,
                code="wrong_shape",
            )


def _open(path: Path, max_bytes: int, framework: str) -> contextlib.AbstractContextManager[Any]:
    """Open with the safetensors library, after the checks that give better reasons than it can."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise _invalid("it is not a regular file")
    with path.open("rb") as raw:
        num_bytes = os.fstat(raw.fileno()).st_size
        start = raw.read(9)
    if num_bytes > max_bytes:
        raise SoftPromptError(
            f"the file has {num_bytes} bytes; at most {max_bytes} are allowed", param="file", code="too_large"
        )
    if start.startswith(b"PK\x03\x04"):
        raise _invalid("it is a zip archive (or a torch.save file)")
    header_bytes = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        raise _invalid("it does not begin with a safetensors header; pickled files are never read")
    if header_bytes > MAX_HEADER_BYTES:
        raise SoftPromptError(
            f"the header has {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed",
            param="file",
            code="too_large",
        )
    try:
        file: contextlib.AbstractContextManager[Any] = safe_open(path, framework=framework)
    except SafetensorError as error:
        reason = str(error)
        if "not fully covered" in reason or "invalid header length" in reason:
            reason = "it is truncated, or has bytes after its last tensor"
        raise _invalid(reason) from None
    except RuntimeError:
        # torch opens the path once more, and may find that the file was removed in between.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    return file


def _non_finite(name: str, where: Sequence[int]) -> SoftPromptError:
    return SoftPromptError(
        f"tensor {name} holds NaN or an infinite value, the first at {list(where)}", param=name, code="non_finite"
    )


def _invalid(reason: str) -> SoftPromptError:
    return SoftPromptError(
        f"not a soft prompt file: {reason}. One .safetensors file with a softbatch manifest is expected",
        param="file",
        code="invalid_file",
    )


def _manifest_of(file: Any) -> Manifest:
    text = (file.metadata() or {}).get(_HEADER_KEY)
    if text is None:
        raise SoftPromptError(
            f"the header metadata has no '{_HEADER_KEY}' entry: a .safetensors file, but not a soft prompt",
            param="manifest",
            code="invalid_manifest",
        )
    manifest = parse_manifest(text)
    layout = {}
    for name in file.keys():  # noqa: SIM118 (a method of the safetensors handle, which is no mapping)
        tensor = file.get_slice(name)
        layout[name] = (tensor.get_shape(), _DTYPES.get(tensor.get_dtype(), tensor.get_dtype()))
    _check_layout(manifest, layout)
    return manifest


def _check_layout(manifest: Manifest, layout: Mapping[str, tuple[Sequence[int], str]]) -> None:
    names = _TENSOR_NAMES[manifest.kind]
    if set(layout) != set(names):
        raise SoftPromptError(
            f"kind {manifest.kind} needs exactly the tensors {', '.join(names)}; "
            f"found {', '.join(sorted(layout)[:8])[:256] or 'none'}",
            param="tensors",
            code="wrong_tensors",
        )
    first_shape, first_dtype = layout[names[0]]
    for name, (shape, dtype) in layout.items():
        if dtype not in _DTYPES.values():
            raise SoftPromptError(
                f"tensor {name} has dtype {dtype}; it must be float32, float16 or bfloat16",
                param=name,
                code="wrong_dtype",
            )
        if dtype != first_dtype:
            raise SoftPromptError("keys and values must have the same dtype", param=name, code="wrong_dtype")
        axes = ("n", "hidden") if manifest.kind == "embeddings" else ("layers", "n", "kv_heads", "head_dim")
        if len(shape) != len(axes) or 0 in shape or shape[axes.index("n")] != manifest.num_virtual_tokens:
            raise SoftPromptError(
                f"tensor {name} has shape {list(shape)}; it must be [{', '.join(axes)}], no axis empty, "
                f"with n = num_virtual_tokens = {manifest.num_virtual_tokens}",
                param=name,
                code="wrong_shape",
            )
        if list(shape) != list(first_shape):
            raise SoftPromptError(
                f"keys {list(first_shape)} and values {list(shape)} must have the same shape",
                param=name,
                code="wrong_shape",
            )
