"""PEFT adapters -> soft prompt, for the PEFT types that leave the model's weights alone."""

from __future__ import annotations

import codecs
import contextlib
import io
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import pydantic_core
from safetensors import SafetensorError

from softbatch.prompt_store.manifest import (
    MAX_VIRTUAL_TOKENS,
    Manifest,
    ModelRef,
    ModelSpec,
    SoftPromptError,
)
from softbatch.prompt_store.soft_prompt_file import SoftPrompt

if TYPE_CHECKING:  # what is no adapter is told without torch
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# For all of these PEFT saves what its get_prompt() hands the model at inference: reparameterisation networks
# (P_TUNING, prefix_projection) and CPT's bounded deltas are already applied.
EMBEDDING_TYPES = ("PROMPT_TUNING", "P_TUNING", "CPT")
KV_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
_TENSOR = "prompt_embeddings"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_ZIP_ENTRIES = 1000
_MAX_ZIP_DIRECTORY_BYTES = 1 << 20

Reader = Callable[[str, int], bytes]
# The model's own weight of a name, None if it has none.
BaseWeight = Callable[[str], "torch.Tensor | None"]


def import_peft(
    source: Path | Sequence[Path], spec: ModelSpec, max_bytes: int, base_weight: BaseWeight = lambda name: None
) -> SoftPrompt:
    """Read an adapter saved by PEFT for the model `spec`; it replaces nothing, as PEFT trains it before BOS.

    `source` is the adapter's folder, a zip of it, or its two files in any order; `max_bytes` bounds the
    weights. Sizes come from the tensor and `spec`: the adapter's own config is not believed.
    Raises SoftPromptError, or OSError when a file cannot be opened.
    """
    if isinstance(source, Path):
        if source.is_dir():
            return _import(_FolderReader(source).read, spec, max_bytes, base_weight)
        with _open_zip(source) as archive:
            return _import(_ZipReader(archive).read, spec, max_bytes, base_weight)
    return _import(_FilesReader(source).read, spec, max_bytes, base_weight)


def looks_like_peft_zip(path: Path) -> bool:
    """Whether this is a zip with an adapter_config.json somewhere; False for anything else, or broken."""
    try:
        with _open_zip(path) as archive:
            return any(_zip_path(name).name == CONFIG_NAME for name in archive.namelist())
    except (SoftPromptError, OSError):
        return False


def _import(read: Reader, spec: ModelSpec, max_bytes: int, base_weight: BaseWeight) -> SoftPrompt:
    config = _parse_config(read(CONFIG_NAME, _MAX_CONFIG_BYTES))
    peft_type = _check_config(config)
    tensor = _prompt_tensor(read(WEIGHTS_NAME, max_bytes), base_weight)
    num_virtual_tokens, width = tensor.shape
    if not 1 <= num_virtual_tokens <= MAX_VIRTUAL_TOKENS:
        raise _refused(
            f"{_TENSOR} has {num_virtual_tokens} virtual tokens; 1 to {MAX_VIRTUAL_TOKENS} are allowed",
            _TENSOR,
            "wrong_shape",
        )
    base = config.get("base_model_name_or_path")
    manifest = Manifest(
        kind="embeddings" if peft_type in EMBEDDING_TYPES else "kv",
        num_virtual_tokens=num_virtual_tokens,
        model=ModelRef(name=spec.name, fingerprint=spec.fingerprint),
        replaces="nothing",
        source=f"peft:{peft_type}",
        created_at=int(time.time()),
        training={"base_model_name_or_path": base[:256]} if isinstance(base, str) else {},
    )
    if manifest.kind == "embeddings":
        _check_width(width, spec.hidden_size, f"hidden size {spec.hidden_size}", peft_type, spec)
        return SoftPrompt(manifest, embeddings=tensor)
    per_layer = f"{spec.num_layers} layers x 2 x {spec.num_kv_heads} kv heads x head_dim {spec.head_dim}"
    expected = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    _check_width(width, expected, f"{per_layer} = {expected}", peft_type, spec)
    # PeftModel.get_prompt: slot 2l holds layer l's keys, slot 2l+1 its values; no rotation is applied.
    slots = tensor.view(num_virtual_tokens, 2 * spec.num_layers, spec.num_kv_heads, spec.head_dim).transpose(0, 1)
    return SoftPrompt(manifest, keys=slots[0::2].contiguous(), values=slots[1::2].contiguous())


def _parse_config(data: bytes) -> dict[str, Any]:
    try:
        config = pydantic_core.from_json(data.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise _refused(f"{CONFIG_NAME} is not valid JSON: {error}", CONFIG_NAME, "invalid_file") from None
    if not isinstance(config, dict):
        raise _refused(f"{CONFIG_NAME} must hold a JSON object", CONFIG_NAME, "invalid_file")
    return config


def _check_config(config: dict[str, Any]) -> str:
    """Returns the PEFT type; refuses adapters that are more than one soft prompt in front of a causal LM."""
    supported = EMBEDDING_TYPES + KV_TYPES
    peft_type = config.get("peft_type")
    if peft_type not in supported:
        shown = repr(peft_type)[:64]
        reason = f"peft_type {shown} is not a soft prompt"
        if peft_type == "MULTITASK_PROMPT_TUNING":
            reason = f"peft_type {shown} holds one prompt per task; train PROMPT_TUNING for a single task"
        raise _unsupported(f"{reason}. Supported: {', '.join(supported)}", "peft_type")
    if config.get("modules_to_save"):
        raise _unsupported("the adapter also replaces modules of the model (modules_to_save)", "modules_to_save")
    task_type = config.get("task_type")
    if task_type not in (None, "CAUSAL_LM") or config.get("num_transformer_submodules") not in (None, 1):
        raise _unsupported(f"task_type {repr(task_type)[:64]} is not supported; it must be 'CAUSAL_LM'", "task_type")
    return str(peft_type)


def _prompt_tensor(data: bytes, base_weight: BaseWeight) -> torch.Tensor:
    """The [n, width] tensor. What PEFT saves beside it, the embedding of a vocabulary that was resized, must be the
    model's."""
    from safetensors.torch import load as load_tensors

    try:
        tensors: dict[str, torch.Tensor] = load_tensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        raise _refused(f"{WEIGHTS_NAME} is not a whole safetensors file", WEIGHTS_NAME, "invalid_file") from None
    others = {name: tensor for name, tensor in tensors.items() if name != _TENSOR}
    own = {name: base_weight(name.removeprefix("base_model.")) for name in others}
    for name, weight in own.items():
        if weight is not None and not _is_same(others[name], weight):
            raise _unsupported(
                f"{name} in {WEIGHTS_NAME} {list(others[name].shape)} is not the model's {list(weight.shape)}: the "
                "adapter was trained with another embedding; serve the model that it was trained with",
                name[:256],
            )
    known = [weight for weight in own.values() if weight is not None]
    # A head that is tied to the embedding is not among the model's weights.
    is_known = all(any(_is_same(tensor, weight) for weight in known) for tensor in others.values())
    if _TENSOR not in tensors or not is_known:
        found = ", ".join(sorted(tensors)[:8])[:256] or "none"
        raise _refused(
            f"{WEIGHTS_NAME} must hold the one tensor {_TENSOR}; found {found}", WEIGHTS_NAME, "wrong_tensors"
        )
    tensor = tensors[_TENSOR]
    if tensor.ndim != 2:
        raise _refused(
            f"{_TENSOR} has shape {list(tensor.shape)}; it must be [virtual tokens, width]",
            _TENSOR,
            "wrong_shape",
        )
    return tensor


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """As far as the shorter of the two dtypes tells."""
    dtype = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return one.shape == other.shape and bool((one.to(dtype) == other.to(dtype)).all())


def _check_width(width: int, expected: int, meaning: str, peft_type: str, spec: ModelSpec) -> None:
    if width != expected:
        raise _refused(
            f"{_TENSOR} is {width} wide, but {peft_type} for model {spec.name} needs {meaning}; the adapter "
            "belongs to another model, or its prefix projection was not applied when it was saved",
            _TENSOR,
            "wrong_shape",
        )


class _FolderReader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = {entry.name for entry in folder.iterdir()}

    def read(self, name: str, limit: int) -> bytes:
        if name not in self._names:
            raise _missing(name, self._names)
        with (self._folder / name).open("rb") as file:
            return _read_bounded(file, name, limit)


class _FilesReader:
    """The two files of an adapter, told apart by their suffix: an upload may have renamed them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = {path.suffix: path for path in paths}
        if len(paths) != 2 or set(self._paths) != {".json", ".safetensors"}:
            raise _missing(WEIGHTS_NAME, {path.name for path in paths})

    def read(self, name: str, limit: int) -> bytes:
        with self._paths[Path(name).suffix].open("rb") as file:
            return _read_bounded(file, name, limit)


def _zip_path(name: str) -> PurePosixPath:
    """An entry's path; some archivers on Windows write backslashes, which the format does not allow."""
    return PurePosixPath(name.replace("\\", "/"))


class _ZipReader:
    """The adapter nearest to the top of the archive (a training run's zip holds its checkpoints too)."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        entries = [(_zip_path(info.filename), info) for info in archive.infolist()]
        folders = {path.parent for path, _ in entries if path.name == CONFIG_NAME}
        if not folders:
            raise _missing(CONFIG_NAME, {path.name for path, _ in entries})
        depth = min(len(folder.parts) for folder in folders)
        nearest = [folder for folder in folders if len(folder.parts) == depth]
        if len(nearest) > 1:
            raise _refused(
                f"the zip holds {len(nearest)} adapters side by side; zip one adapter's folder",
                "file",
                "invalid_file",
            )
        self._infos = {path.name: info for path, info in entries if path.parent == nearest[0]}

    def read(self, name: str, limit: int) -> bytes:
        if name not in self._infos:
            raise _missing(name, set(self._infos))
        info = self._infos[name]
        # Other methods may ask for gigabytes of dictionary; PEFT folders are zipped with these two.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise _refused(f"{name} must be stored or deflated in the zip, unencrypted", "file", "invalid_file")
        try:
            with self._archive.open(info) as file:
                return _read_bounded(file, name, limit)
        except SoftPromptError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError):
            raise _refused(f"{name} is damaged in the zip", "file", "invalid_file") from None


class _BoundedFile(io.FileIO):
    """Never reads more at once than a central directory may have, so a zip cannot claim a huge one."""

    def read(self, size: int | None = -1) -> bytes:
        wanted = _MAX_ZIP_DIRECTORY_BYTES if size is None or size < 0 else min(size, _MAX_ZIP_DIRECTORY_BYTES)
        return super().read(wanted) or b""


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    with _BoundedFile(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise _refused(
                "not a zip of an adapter's folder: it is something else, damaged, or lists too many files",
                "file",
                "invalid_file",
            ) from None
        if len(archive.namelist()) > _MAX_ZIP_ENTRIES:
            raise _refused(f"the zip has more than {_MAX_ZIP_ENTRIES} entries", "file", "too_large")
        yield archive


def _read_bounded(file: IO[bytes], name: str, limit: int) -> bytes:
    data = io.BytesIO()
    while chunk := file.read(1 << 20):
        if data.tell() + len(chunk) > limit:
            raise _refused(f"{name} has more than the allowed {limit} bytes", name, "too_large")
        data.write(chunk)
    return data.getvalue()


def _missing(name: str, found: set[str]) -> SoftPromptError:
    if name == WEIGHTS_NAME and any(other.endswith((".bin", ".pt", ".pth")) for other in found):
        return _refused(
            "pickled weights are never read; save the adapter as safetensors, as save_pretrained does",
            WEIGHTS_NAME,
            "unsupported_adapter",
        )
    return _refused(f"{name} is missing: an adapter is {CONFIG_NAME} and {WEIGHTS_NAME}", name, "invalid_file")


def _unsupported(message: str, param: str) -> SoftPromptError:
    return _refused(message, param, "unsupported_adapter")


def _refused(message: str, param: str, code: str) -> SoftPromptError:
    return SoftPromptError(message, param=param, code=code)
