"""What a run leaves: the soft prompt's file with its manifest, and the report; found again, and registered."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from softbatch.prompt_store.compression.compression_settings import Kind, Objective
from softbatch.prompt_store.compression.work_directory import identity_of, seconds_spent
from softbatch.prompt_store.manifest import ContextRef, Manifest, ModelRef, ModelSpec
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, read_manifest, save
from softbatch.prompt_store.stores.kept_text import KeptText, read_kept, write_kept
from softbatch.prompt_store.stores.store import NameTaken, SoftPromptStore, StoredPrompt
from softbatch.server.compressions.request import CompressionRequest, InputError
from softbatch.server.compressions.run_directory import DATA, KEPT, RESULT

if TYPE_CHECKING:
    from softbatch.prompt_store.compression.pipeline import Outcome
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
        request = prepared.request
        seconds_spent(directory / "work", identity_of(request.settings, request.context, request.questions))
        made_for = read_manifest(finished.prompt, request.max_prompt_bytes).model.name
        if made_for != prepared.model.name:
            raise InputError("model", f"this compression was made with {made_for}; resume it with that model")
    return finished


def keep(outcome: Outcome, request: CompressionRequest, spec: ModelSpec, directory: Path) -> Finished:
    """The soft prompt last: with it the run is over."""
    from softbatch.prompt_store.compression.evaluation.report import write_report  # needs torch, which the run has

    prompt = SoftPrompt(_manifest(outcome, request, spec), **outcome.tensors)
    write_report(outcome.report, directory / "report", request.name)
    for name in DATA:
        if (directory / "work" / name).exists():
            shutil.copyfile(directory / "work" / name, directory / "report" / name)
    if request.kept is not None:
        write_kept(request.kept, directory / KEPT)
    save(prompt, directory / RESULT)
    return Finished(directory / RESULT, outcome.report, request.kept)


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


def register(store: SoftPromptStore, name: str, finished: Finished) -> StoredPrompt:
    """Add the result to the store; once more does no harm. Raises SoftPromptError."""
    try:
        return store.add(name, finished.prompt, kept=finished.kept)
    except NameTaken:
        stored = store.get(name)
        if stored.sha256 != hashlib.sha256(finished.prompt.read_bytes()).hexdigest():
            raise
        return stored


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures at the top level of a report."""
    return {name: value for name, value in report.items() if isinstance(value, int | float | str | None)}
