"""What a start has found out about a model's files, kept for the next: that one imports no transformers.

What is kept is one with its checksum and with the state of the model's files before they were read. Every start
compares what it serves with the kept logits, and begins anew where they differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from softbatch.prompt_store.atomic_files import process_directory
from softbatch.scheduler.model.llama.outline import Outline, outline_of, read_outlined
from softbatch.scheduler.model.model_error import ArchitectureError
from softbatch.scheduler.model.model_files import first_line
from softbatch.scheduler.model.self_check import Yardstick

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
MOST_KEPT = 16  # starts; the one that was used longest ago goes first
# A file that changed so shortly before may change again without a new time stamp.
_SETTLED_SECONDS = 2.0
_NOTE, _NUMBERS, _TOKENIZER, _SUM = "start.json", "start.safetensors", "tokenizer.json", "sha256"
_FILES = (_NOTE, _NUMBERS, _TOKENIZER)
_LOGITS, _BUFFER = "logits", "buffer."
_SOURCES = Path(__file__).resolve().parents[2]
# Of each file its name, and all that changes when its content does.
Seen = tuple[tuple[str, int, int, int, int, int], ...]


class Note(msgspec.Struct, frozen=True):
    """All that is no tensor. `has_short_windows`: the logits are those of shortened windows."""

    outline: Outline
    fingerprint: str
    eos_token_ids: list[int]
    tokens: list[int]
    rounding: float
    has_short_windows: bool


@dataclass(frozen=True, eq=False)
class EarlierStart:
    """One that can be gone on from."""

    note: Note
    yardstick: Yardstick
    _path: str
    _seen: Seen
    _tokenizer: bytes
    _buffers: Mapping[str, torch.Tensor]
    _files: Mapping[str, Path]

    def model(self) -> Any:
        """With weights of its own, so that the files may go. Raises ArchitectureError, also where the files are no
        longer those that the start was of."""
        try:
            opened: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in set(self._files.values())}

            def weight(name: str) -> torch.Tensor:
                tensor: torch.Tensor = opened[self._files[name]].get_tensor(name)
                return tensor.to(self.yardstick.dtype, copy=True)

            model = read_outlined(self.note.outline, weight, self._buffers)
            if _state(self._path) != self._seen:
                raise ArchitectureError("its files have changed meanwhile")
            return model
        except Exception as error:  # of many kinds, as files may be damaged in many ways
            raise ArchitectureError(first_line(error)) from error

    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_buffer(self._tokenizer)


class EarlierStarts:
    """The starts that are kept in a directory, one for each dtype of each state of a model's files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def of(self, path: str, dtype: torch.dtype) -> StartsOfState | None:
        """Those of a model's files as they are at this moment, which is before they are read. None where there are
        none."""
        try:
            return StartsOfState(self._root, path, dtype, _state(path)) if Path(path).is_dir() else None
        except OSError as error:
            logger.debug("the files of the model cannot be looked at: %s", error)
            return None


@dataclass(frozen=True)
class StartsOfState:
    """What was found out, or will be, about a model's files in one state."""

    _root: Path
    _path: str
    _dtype: torch.dtype
    _seen: Seen

    def find(self) -> EarlierStart | None:
        try:
            directory = self._root / _key(self._seen, self._dtype)
            read = {name: (directory / name).read_bytes() for name in _FILES}
            if (directory / _SUM).read_text() != _checksum(read):
                raise ValueError("its checksum is another one")
            note = msgspec.json.decode(read[_NOTE], type=Note)
            numbers = load_tensors(read[_NUMBERS])
            yardstick = Yardstick(note.tokens, numbers.pop(_LOGITS), [], note.rounding, self._dtype)
            buffers = {name.removeprefix(_BUFFER): tensor for name, tensor in numbers.items()}
            with contextlib.suppress(OSError):  # of a cache that is only read from
                os.utime(directory)
            files = _stored(self._path)
            return EarlierStart(note, yardstick, self._path, self._seen, read[_TOKENIZER], buffers, files)
        except FileNotFoundError:
            return None
        except Exception as error:  # damaged, in whatever way
            logger.debug("what an earlier start has kept cannot be read: %s", error)
            return None

    def begin(self, model: Any) -> _NewStart | None:
        """Before weights are laid out anew. None where nothing can be kept."""
        try:
            outline = outline_of(model, _stored(self._path))
            if outline is None:
                return None
            buffers = {name: buffer.detach().clone().contiguous() for name, buffer in model.named_buffers()}
            return _NewStart(self._root, self._path, self._seen, outline, buffers)
        except Exception as error:  # a start that keeps nothing is a good one, too
            logger.debug("nothing can be kept of this start: %s", error)
            return None


@dataclass(frozen=True, eq=False)
class _NewStart:
    """What will be kept if all checks are passed."""

    _root: Path
    _path: str
    _seen: Seen
    _outline: Outline
    _buffers: Mapping[str, torch.Tensor]

    def keep(
        self, fingerprint: str, eos_token_ids: list[int], yardstick: Yardstick, has_windows: bool, tokenizer: Any
    ) -> None:
        """Where nothing can be written, nothing is kept."""
        note = Note(self._outline, fingerprint, eos_token_ids, list(yardstick.tokens), yardstick.rounding, has_windows)
        numbers = {f"{_BUFFER}{name}": buffer for name, buffer in self._buffers.items()}
        try:
            changed = max(max(each[-2:]) for each in self._seen) / 1e9
            settled = time.time() - changed >= _SETTLED_SECONDS
            if yardstick.choices or not settled or _state(self._path) != self._seen:
                return
            kept = {
                _NOTE: msgspec.json.encode(note),
                _NUMBERS: save_tensors({_LOGITS: yardstick.logits.contiguous(), **numbers}),
                _TOKENIZER: tokenizer.to_str().encode(),
            }
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with process_directory(self._root, ".keeping-") as aside:
                for name, content in (*kept.items(), (_SUM, _checksum(kept).encode())):
                    (aside / name).write_bytes(content)
                target = self._root / _key(self._seen, yardstick.dtype)
                shutil.rmtree(target, ignore_errors=True)
                aside.rename(target)
            self._remove_oldest()
        except Exception as error:  # of many kinds: a full disk's, another process's that was quicker
            logger.debug("nothing is kept of this start: %s", error)

    def _remove_oldest(self) -> None:
        kept = sorted(self._root.glob("[!.]*"), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in kept[MOST_KEPT:]:
            shutil.rmtree(entry, ignore_errors=True)


def _key(seen: Seen, dtype: torch.dtype) -> str:
    return hashlib.sha256(repr((seen, dtype, _versions())).encode()).hexdigest()[:32]


@cache
def _versions() -> tuple[str, ...]:
    """Of all that has a say in what is kept."""
    files = sorted([*(_SOURCES / "scheduler" / "model").rglob("*.py"), *(_SOURCES / "prompt_store").glob("*.py")])
    own = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return (own, *map(version, ("softbatch", "transformers", "tokenizers")), str(torch.__version__))


def _checksum(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in _FILES)).hexdigest()


def _state(path: str) -> Seen:
    """Of every file in the directory, those of its folders too, as chat templates lie in one. Raises OSError."""
    files = [(str(file.relative_to(path)), file.stat()) for file in sorted(Path(path).rglob("*")) if file.is_file()]
    return tuple(
        (name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in files
    )


def _stored(path: str) -> dict[str, Path]:
    """Each tensor's file; none that is in two. Raises OSError or SafetensorError."""
    found: dict[str, list[Path]] = {}
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found.setdefault(name, []).append(file)
    return {name: files[0] for name, files in found.items() if len(files) == 1}
