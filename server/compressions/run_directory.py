"""A run's directory: who holds it, which model it belongs to, and what of it is cleared away.

work/                     the library's: questions, gold answers, checkpoint
model                     fingerprint of the model that `work` was made with
report/                   report.json, report.html, the training and held-out data
preview.safetensors       σ as training found it, if a preview was asked for
previewed                 its SHA-256, once the command has registered it; a server's job says so in its record
kept_text.json            what is kept with the result, and with the preview, if anything
soft_prompt.safetensors   the result; when it is there, the run is over
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softbatch.prompt_store.atomic_files import lock, replace_file
from softbatch.server.compressions.request import LOCK, InputError

DATA = ("questions.jsonl", "train.jsonl", "held_out.jsonl")
RESULT = "soft_prompt.safetensors"
KEPT = "kept_text.json"
PREVIEW = "preview.safetensors"
PREVIEWED = "previewed"


@contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """Hold the directory's lock, which goes with the process that holds it. Raises InputError when another does."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        try:
            lock(file, wait)
        except BlockingIOError:
            raise InputError(
                "name", "another process is compressing under this name right now", code="name_taken"
            ) from None
        yield


def has_work(directory: Path) -> bool:
    """Whether gold answers or more of an unfinished run lie in the directory, or a result that is not registered."""
    return (directory / RESULT).exists() or any((directory / "work" / name).exists() for name in DATA)


def discard(directory: Path, but_result: bool = False) -> None:
    """Delete what a run leaves for resuming, its result first; the report stays."""
    for name in (PREVIEW, PREVIEWED, "model") if but_result else (RESULT, KEPT, PREVIEW, PREVIEWED, "model"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "work", ignore_errors=True)


def check_same_model(directory: Path, fingerprint: str) -> None:
    """Write down which model the work is made with. Raises InputError when that was another one."""
    path = directory / "model"
    if path.exists() and path.read_text() != fingerprint:
        raise InputError("model", "this compression was begun with another model; begin anew, without --resume")
    replace_file(path, lambda target: target.write_text(fingerprint))
