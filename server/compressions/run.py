"""One compression in its directory: from a prepared run to a soft prompt file, resumable at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from softbatch.prompt_store.compression.outcome import Outcome
from softbatch.prompt_store.compression.pipeline import Compression
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.manifest import ModelSpec
from softbatch.scheduler.model.source import ModelError
from softbatch.server.compressions.other_prompts import another_prefix
from softbatch.server.compressions.prepare import PreparedRun
from softbatch.server.compressions.result import (
    Finished,
    check_same_run,
    find_preview,
    finished_before,
    keep,
    keep_preview,
)
from softbatch.server.compressions.run_directory import check_same_model, discard
from softbatch.server.compressions.session import CompressionSession

# Phases that ask the engine for answers; it is released with the first of the others.
ANSWERING = frozenset({"self_study", "gold", "estimate", "preview", "answers"})


@contextmanager
def _told_when_memory_is_short() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            "the GPU has too little free memory for this compression; a server leaves more beside it with a lower "
            "--gpu-memory-utilization"
        ) from error


@_told_when_memory_is_short()
def run_compression(
    prepared: PreparedRun,
    directory: Path,
    resume: bool,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    check_model: Callable[[ModelSpec], None] = lambda spec: None,
    on_preview: Callable[[Finished], None] = lambda preview: None,
) -> Finished:
    """Run it, or go on with it. `check_model` sees the model before any work is done, and may raise. `on_preview` gets
    the preview if the request wants one: once it is there, and when a run that had made it goes on.

    Raises Stopped when `should_stop` said so, InputError, ValueError or ModelError when it cannot be done.
    """
    began = time.monotonic()
    if resume and (finished := finished_before(prepared, directory)):
        return finished
    directory.mkdir(parents=True, exist_ok=True)
    if not resume:
        discard(directory)
    request, preview = prepared.request, find_preview(directory)
    if preview is not None:
        check_same_run(prepared, directory)
    on_progress(Progress("loading", 0, 1))
    session = CompressionSession.open(prepared.model, prepared.context, request.max_prompt_bytes)
    try:
        check_model(session.spec)
        check_same_model(directory, session.spec.fingerprint)

        def report_progress(progress: Progress) -> None:
            if progress.phase not in ANSWERING:
                session.release_engine()
            on_progress(progress)

        def make_preview(outcome: Outcome) -> None:
            on_preview(keep_preview(outcome, request, session.spec, directory))

        if preview is not None and request.preview:
            on_preview(preview)
        outcome = Compression(
            session.decoder,
            prepared.context,
            request.settings,
            session.generate,
            session.respond,
            directory / "work",
            request.questions,
            another_prefix(prepared, session.decoder, session.spec, directory.parents[1]),
            report_progress,
            should_stop,
            make_preview if request.preview and preview is None else None,
            opening=time.monotonic() - began,
            engine=session.engine_seconds,
        ).run(resume)
    finally:
        session.release_engine()
    return keep(outcome, request, session.spec, directory)
