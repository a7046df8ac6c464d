"""`softbatch.compress`: a context becomes a registered soft prompt, from Python and without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from softbatch.prompt_store.compression.compression_settings import Kind, Objective
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.stores.store import NameTaken, SoftPromptStore, StoredPrompt
from softbatch.scheduler.model.source import EMBEDDED_ALIAS
from softbatch.server.compressions.prepare import ModelFiles, PreparedRun
from softbatch.server.compressions.request import (
    DIRECTORY,
    InputError,
    ModelChoice,
    as_users,
    make_request,
    make_settings,
    read_context,
)
from softbatch.server.compressions.result import previewed, register, register_once, register_own, sha256_of_file
from softbatch.server.compressions.run import run_compression
from softbatch.server.compressions.run_directory import PREVIEW, discard, has_work, locked


def compress(
    context: str | Path,
    name: str,
    store: SoftPromptStore,
    model: str = EMBEDDED_ALIAS,
    *,
    dtype: str = "auto",
    device: str = "auto",
    objective: Objective | None = None,
    alpha: float | None = None,
    kind: Kind | None = None,
    virtual_tokens: int | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    answer_tokens: int | None = None,
    instruction: str | None = None,
    questions: Sequence[Example] = (),
    seed: int | None = None,
    keep_text: bool = False,
    recall: int | None = None,
    preview: bool = False,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> StoredPrompt:
    """Learn a soft prompt for a text, or for a file's text when `context` is a Path, and register it in `store`.

    None means what the flag of `softbatch compress` means when it is left out. The report is in the store's
    directory; its figures are `manifest.fidelity`. Raises InputError, SoftPromptError, ModelError or ValueError when
    it cannot be done, and Stopped when `should_stop` said so: `resume` then goes on with it.
    """
    request = make_request(
        name=name,
        context=read_context(context) if isinstance(context, Path) else context,
        settings=make_settings(
            objective=objective,
            alpha=alpha,
            kind=kind,
            virtual_tokens=virtual_tokens,
            minutes=minutes,
            steps=steps,
            max_answer_tokens=answer_tokens,
            instruction=instruction,
            seed=seed,
        ),
        questions=as_users(questions),
        choice=lambda: ModelChoice(model, dtype=dtype, device=device),
        store=store.location,
        max_prompt_bytes=store.max_bytes,
        keep_text=keep_text,
        recall=recall,
        preview=preview,
    )
    directory = store.root / DIRECTORY / name
    _check_name(name, store, directory)
    prepared = PreparedRun.checked(request, ModelFiles.open(request.choice), directory, store.max_bytes)
    return _registered(prepared, store, resume, on_progress, should_stop)


def _check_name(name: str, store: SoftPromptStore, directory: Path) -> None:
    """The preview of a run that was stopped is its own. Raises SoftPromptError."""
    try:
        store.check_free(name)
    except NameTaken:
        if not has_work(directory) or store.get(name).sha256 != sha256_of_file(directory / PREVIEW):
            raise


def _registered(
    prepared: PreparedRun,
    store: SoftPromptStore,
    resume: bool,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> StoredPrompt:
    name = prepared.request.name
    directory = store.root / DIRECTORY / name
    with locked(directory):
        if has_work(directory) and not resume:
            raise InputError("name", f"unfinished work for {name} lies in {directory}: resume it or delete it")
        finished = run_compression(
            prepared,
            directory,
            resume,
            on_progress,
            should_stop,
            on_preview=lambda preview: register_once(preview, lambda found: register(store, name, found)),
        )
        stored = register_own(store, name, finished, previewed(directory))
        discard(directory)
    return stored
