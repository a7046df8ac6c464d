"""The work directory of one compression: whose it is, and how much time has gone into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from softbatch.prompt_store.atomic_files import replace_file
from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.frozen.tokenized_context import sha256_of

if TYPE_CHECKING:  # a run is known by its record, without torch
    from torch import Tensor


def save_states(states: Sequence[Tensor], path: Path) -> None:
    """Tensors [rows, hidden] of one dtype, in order, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    sizes = torch.tensor([len(state) for state in states], device="cpu")
    tensors = {"sizes": sizes, "states": torch.cat(list(states)).cpu().contiguous()}
    replace_file(path, lambda target: save_file(tensors, target))


def load_states(path: Path) -> list[Tensor]:
    """Raises ValueError when the file cannot be read."""
    import torch
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        return list(torch.split(tensors["states"], tensors["sizes"].tolist()))
    except (OSError, KeyError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"resume: {path.name} in the work directory cannot be read: {error}") from None


def identity_of(settings: CompressionSettings, context: str, user_examples: Sequence[Example]) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    return {
        "settings": asdict(settings),
        "context": sha256_of(context),
        # Without a field that runs of older code do not know, where it says nothing.
        "user_examples": hashlib.sha256(
            repr(list(user_examples)).replace(", accept=()", "").replace(", passage=''", "").encode()
        ).hexdigest(),
    }


def seconds_spent(work: Path, identity: dict[str, Any]) -> float:
    """By the run in the work directory. Raises ValueError when that is another run, or cannot be read."""
    try:
        record = json.loads((work / "job.json").read_text(encoding="utf-8"))
        elapsed = float(record["elapsed"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            "resume: job.json in the work directory cannot be read; delete the directory to begin anew"
        ) from None
    # Runs of older code do not know of settings that came later.
    record["settings"] = {**asdict(CompressionSettings()), **(record.get("settings") or {})}
    if any(record.get(key) != value for key, value in identity.items()):
        raise ValueError("resume: the work directory belongs to a run with other settings or another context")
    return elapsed


class JobDirectory:
    """Owns job.json: the run's identity and the seconds spent so far. The phases keep their own files beside it."""

    FILES = (
        "questions.jsonl",
        "held_out.jsonl",
        "train.jsonl",
        "forecast.json",
        "answers.json",
        "baselines.json",
        "teacher.safetensors",
        "matching.safetensors",
        "checkpoint/state.json",
        "job.json",
    )

    def __init__(self, path: Path, identity: dict[str, Any], clock: Callable[[], float]) -> None:
        self.path, self._identity, self._clock = path, identity, clock
        self._started = clock()

    def open(self, resume: bool) -> None:
        """Start afresh, or go on with what is there. Raises ValueError when that is another run's or unreadable."""
        self.path.mkdir(parents=True, exist_ok=True)
        if resume and (self.path / "job.json").exists():
            self._started = self._clock() - seconds_spent(self.path, self._identity)
            return
        for name in self.FILES:
            (self.path / name).unlink(missing_ok=True)
        self.save()

    def has_any(self, names: Sequence[str]) -> bool:
        return any((self.path / name).exists() for name in names)

    def elapsed(self) -> float:
        return self._clock() - self._started

    def save(self) -> None:
        record = {**self._identity, "elapsed": self.elapsed()}
        replace_file(self.path / "job.json", lambda path: path.write_text(json.dumps(record), encoding="utf-8"))
