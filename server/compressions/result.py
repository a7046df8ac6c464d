"""What a run leaves: the soft prompt's file with its manifest, and the report; found again, and registered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from softbatch.prompt_store.atomic_files import replace_file
from softbatch.prompt_store.compression.compression_settings import Kind, Objective
from softbatch.prompt_store.compression.work_directory import identity_of, seconds_spent
from softbatch.prompt_store.manifest import PREVIEW_OF, ContextRef, Manifest, ModelRef, ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, read_manifest, save
from softbatch.prompt_store.stores.kept_text import KeptText, read_kept, write_kept
from softbatch.prompt_store.stores.store import NameChanged, NameTaken, SoftPromptStore, StoredPrompt
from softbatch.server.compressions.record import ID, new_id
from softbatch.server.compressions.request import CompressionRequest, InputError
from softbatch.server.compressions.run_directory import DATA, KEPT, PREVIEW, PREVIEWED, RESULT

if TYPE_CHECKING:
    from softbatch.prompt_store.compression.outcome import Outcome
    from softbatch.server.compressions.prepare import PreparedRun

SOURCE = "softbatch compress"
_SECTIONS = ("answers", "curve", "off_topic", "baselines", "right_answers")


@dataclass(frozen=True)
class Finished:
    """`prompt` is the soft prompt's file, `report` what report.json says, `kept` what is to be kept with it."""

    prompt: Path
    report: dict[str, Any]
    kept: KeptText | None = None


def find_finished(directory: Path) -> Finished | None:
    """The result, if the run came to its end."""
    prompt, report = directory / RESULT, directory / "report" / "report.json"
    if not prompt.exists() or not report.exists():
        return None
    return Finished(prompt, json.loads(report.read_text(encoding="utf-8")), read_kept(directory / KEPT))


def finished_before(prepared: PreparedRun, directory: Path) -> Finished | None:
    """The result of this very run, if it came to its end. Raises InputError or ValueError when it is another's."""
    finished = find_finished(directory)
    if finished is not None:
        check_same_run(prepared, directory)
        made_for = read_manifest(finished.prompt, prepared.request.max_prompt_bytes).model.name
        if made_for != prepared.model.name:
            raise InputError("model", f"this compression was made with {made_for}; resume it with that model")
    return finished


def check_same_run(prepared: PreparedRun, directory: Path) -> None:
    """Raises ValueError where the directory's work is another run's."""
    request = prepared.request
    seconds_spent(directory / "work", identity_of(request.settings, request.context, request.questions))


def keep(outcome: Outcome, request: CompressionRequest, spec: ModelSpec, directory: Path) -> Finished:
    """The soft prompt last: with it the run is over."""
    from softbatch.prompt_store.compression.evaluation.report import write_report  # needs torch, which the run has

    prompt = SoftPrompt(_manifest(outcome, request, spec), **outcome.tensors)
    write_report(outcome.report, directory / "report", request.name)
    for name in DATA:
        if (directory / "work" / name).exists():
            shutil.copyfile(directory / "work" / name, directory / "report" / name)
    _keep_text(request, directory)
    save(prompt, directory / RESULT)
    return Finished(directory / RESULT, outcome.report, request.kept)


def keep_preview(outcome: Outcome, request: CompressionRequest, spec: ModelSpec, directory: Path) -> Finished:
    """One for the run, whatever becomes of it: its file, with the compression's id, is known by its hash."""
    job_id = directory.name if ID.fullmatch(directory.name) else new_id()
    manifest = _manifest(outcome, request, spec)
    manifest = manifest.model_copy(update={"training": {**manifest.training, PREVIEW_OF: job_id}})
    _keep_text(request, directory)
    save(SoftPrompt(manifest, **outcome.tensors), directory / PREVIEW)
    return Finished(directory / PREVIEW, outcome.report, request.kept)


def find_preview(directory: Path) -> Finished | None:
    """If the run has come to it."""
    preview = directory / PREVIEW
    return Finished(preview, {}, read_kept(directory / KEPT)) if preview.exists() else None


def _keep_text(request: CompressionRequest, directory: Path) -> None:
    if request.kept is not None:
        write_kept(request.kept, directory / KEPT)
    else:
        (directory / KEPT).unlink(missing_ok=True)  # of a run that was asked for it before it was stopped


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


def register(store: SoftPromptStore, name: str, finished: Finished, preview: str | None = None) -> StoredPrompt:
    """Add the result to the store, in the place of its registered preview (by its SHA-256) if there is one; once more
    does no harm. Raises SoftPromptError."""
    try:
        if preview is not None:
            return store.swap(name, preview, finished.prompt, finished.kept)
        return store.add(name, finished.prompt, kept=finished.kept)
    except (NameTaken, NameChanged) as error:
        stored = store.get(name) if isinstance(error, NameTaken) or not error.is_gone else None
        if stored is not None and stored.sha256 == sha256_of_file(finished.prompt):
            return stored
        own = finished.prompt.with_name(PREVIEW)
        if preview is None and stored is not None and stored.sha256 == sha256_of_file(own):
            return register(store, name, finished, stored.sha256)  # killed before it wrote that down
        raise


def register_own(store: SoftPromptStore, name: str, finished: Finished, preview: str | None) -> StoredPrompt:
    """`register` for a command, whose user asks for the name: also where the preview was deleted. Raises like it."""
    try:
        return register(store, name, finished, preview)
    except NameChanged as error:
        if not error.is_gone:
            raise
        return register(store, name, finished)


def sha256_of_file(path: Path) -> str | None:
    """None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def register_once(preview: Finished, add: Callable[[Finished], object]) -> None:
    """A preview that somebody has deleted since is not registered again when its run goes on."""
    marker, sha256 = preview.prompt.with_name(PREVIEWED), sha256_of_file(preview.prompt) or ""
    if not marker.exists():
        add(preview)
        replace_file(marker, lambda path: path.write_text(sha256))


def previewed(directory: Path) -> str | None:
    """The SHA-256 of the preview that was registered, if one was."""
    marker = directory / PREVIEWED
    return marker.read_text() if marker.exists() else None


def withdraw(store: SoftPromptStore, name: str, preview: str) -> None:
    """Unregister a preview, unless the name leads elsewhere by now."""
    with contextlib.suppress(NameChanged):
        store.remove(name, only=preview)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures at the top level of a report."""
    return {name: value for name, value in report.items() if isinstance(value, int | float | str | None)}
