"""What a model's files hold, read without the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch


def stored_weight(path: str, name: str) -> torch.Tensor | None:
    """`path` is what `from_pretrained` takes. None if no safetensors file there has such a weight, with or without the
    name of the whole model in front."""
    for file in sorted(_directory(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if key == name or key.endswith(f".{name}") or name.endswith(f".{key}"):
                        tensor: torch.Tensor = opened.get_tensor(key)
                        return tensor
        except (SafetensorError, OSError):
            continue
    return None


def num_stored(path: str) -> int:
    """How many numbers all safetensors files there hold. Raises OSError or SafetensorError."""
    total = 0
    for file in sorted(_directory(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            total += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    return total


def _directory(path: str) -> Path:
    """A hub id's files lie in the hub's cache, as the model has been loaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(path)
