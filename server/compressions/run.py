"""One compression in its directory: from a request to a soft prompt file and its report, resumable at any moment.

work/                     the library's: questions, gold answers, checkpoint
model                     fingerprint of the model that `work` was made with
report/                   report.json, report.html, the training and held-out data
soft_prompt.safetensors   the result; when it is there, the run is over
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from softbatch.prompt_store.atomic_files import lock, replace_file
from softbatch.prompt_store.compression.evaluation.report import write_report
from softbatch.prompt_store.compression.objectives import Objective
from softbatch.prompt_store.compression.pipeline import Compression, Outcome, identity_of
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.training.student import Kind
from softbatch.prompt_store.compression.work_directory import seconds_spent
from softbatch.prompt_store.manifest import ContextRef, Manifest, ModelRef, ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, read_manifest, save
from softbatch.prompt_store.stores.directory import NameTaken, PromptStore, StoredPrompt
from softbatch.scheduler.model.source import ModelError
from softbatch.server.compressions.prepare import PreparedRun
from softbatch.server.compressions.request import CompressionRequest, InputError
from softbatch.server.compressions.session import CompressionSession

DIRECTORY = ".compressions"
LOCK = "lock"  # in it, of the server that runs the compressions; and in each one's directory
# Phases that ask the engine for answers; it is released with the first of the others.
ANSWERING = frozenset({"self_study", "gold"})
DATA = ("questions.jsonl", "train.jsonl", "held_out.jsonl")
SOURCE = "softbatch compress"
_SECTIONS = ("answers", "curve", "off_topic", "baselines")


@dataclass(frozen=True)
class Finished:
    """`prompt` is the soft prompt's file, `report` what report.json says."""

    prompt: Path
    report: dict[str, Any]


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
) -> Finished:
    """Run it, or go on with it. `check_model` sees the model before any work is done, and may raise.

    Raises Stopped when `should_stop` said so, InputError, ValueError or ModelError when it cannot be done.
    """
    began = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    finished = find_finished(directory)
    request, work = prepared.request, directory / "work"
    settings = request.settings
    if resume and finished is not None:
        seconds_spent(work, identity_of(settings, request.context, request.questions))
        made_for = read_manifest(finished.prompt, request.max_prompt_bytes).model.name
        if made_for != prepared.model.name:
            raise InputError("model", f"this compression was made with {made_for}; resume it with that model")
        return finished
    if not resume:
        discard(directory)
    session = CompressionSession.open(
        prepared.model,
        prepared.context_tokens,
        settings.max_answer_tokens,
        request.max_prompt_bytes,
        settings.instruction,
    )
    try:
        check_model(session.spec)
        _check_same_model(directory, session.spec)

        def report_progress(progress: Progress) -> None:
            if progress.phase not in ANSWERING:
                session.release_engine()
            on_progress(progress)

        outcome = Compression(
            session.decoder,
            session.tokenizer,
            request.context,
            settings,
            session.generate,
            work,
            request.questions,
            session.another_prefix(
                PromptStore(Path(request.store), request.max_prompt_bytes), request.context, settings.virtual_tokens
            ),
            report_progress,
            should_stop,
            opening=time.monotonic() - began,
        ).run(resume)
    finally:
        session.release_engine()
    return _keep(outcome, request, session.spec, directory)


def _keep(outcome: Outcome, request: CompressionRequest, spec: ModelSpec, directory: Path) -> Finished:
    """The soft prompt last: with it the run is over."""
    work = directory / "work"
    write_report(outcome.report, directory / "report", request.name)
    for name in DATA:
        if (work / name).exists():
            shutil.copyfile(work / name, directory / "report" / name)
    prompt = SoftPrompt(_manifest(outcome, request, spec), **outcome.tensors)
    save(prompt, directory / "soft_prompt.safetensors")
    return Finished(directory / "soft_prompt.safetensors", outcome.report)


def find_finished(directory: Path) -> Finished | None:
    """The result, if the run came to its end."""
    prompt, report = directory / "soft_prompt.safetensors", directory / "report" / "report.json"
    if not prompt.exists() or not report.exists():
        return None
    return Finished(prompt, json.loads(report.read_text(encoding="utf-8")))


def has_work(directory: Path) -> bool:
    """Whether gold answers or more of an unfinished run lie in the directory."""
    return any((directory / "work" / name).exists() for name in DATA) or find_finished(directory) is not None


def discard(directory: Path) -> None:
    """Delete what a run leaves for resuming, its result first; the report stays."""
    for name in ("soft_prompt.safetensors", "model"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "work", ignore_errors=True)


def register(store: PromptStore, name: str, finished: Finished) -> StoredPrompt:
    """Add the result to the store; once more does no harm. Raises SoftPromptError."""
    try:
        return store.add(name, finished.prompt)
    except NameTaken:
        stored = store.get(name)
        if stored.path.read_bytes() != finished.prompt.read_bytes():
            raise
        return stored


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


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures at the top level of a report."""
    return {name: value for name, value in report.items() if isinstance(value, int | float | str | None)}


def _check_same_model(directory: Path, spec: ModelSpec) -> None:
    path = directory / "model"
    if path.exists() and path.read_text() != spec.fingerprint:
        raise InputError("model", "this compression was begun with another model; begin anew, without --resume")
    replace_file(path, lambda target: target.write_text(spec.fingerprint))


def _manifest(outcome: Outcome, request: CompressionRequest, spec: ModelSpec) -> Manifest:
    """The report goes in as far as there is room; its longest parts are left out first."""
    report = {name: value for name, value in outcome.report.items() if name != "training"}
    settings = request.settings
    while True:
        try:
            return Manifest(
                kind=cast(Kind, outcome.kind),
                num_virtual_tokens=settings.virtual_tokens,
                model=ModelRef(name=spec.name, fingerprint=spec.fingerprint),
                replaces="system",
                context=ContextRef(sha256=outcome.context_sha256, num_tokens=outcome.context_tokens),
                objective=cast(Objective, settings.objective),
                source=SOURCE,
                created_at=int(time.time()),
                training=outcome.report["training"],
                fidelity=report,
            )
        except ValidationError:
            longest = next((name for name in _SECTIONS if name in report), None)
            if longest is None:
                raise
            del report[longest]
