"""`softbatch compress`: a context becomes a registered soft prompt."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from softbatch.prompt_store.compression.pace import Stopped
from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.store import NameChanged, NameTaken
from softbatch.scheduler.model.source import ModelError
from softbatch.server.cli.fidelity_table import fidelity_table, right_answers_table
from softbatch.server.cli.model_flags import check_report, choice_of
from softbatch.server.cli.progress_bars import ProgressView, duration
from softbatch.server.cli.registry import LocalRegistry, Registry, RemoteRegistry
from softbatch.server.cli.server_client import ServerClient
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.compressions.prepare import ModelFiles, PreparedRun
from softbatch.server.compressions.request import (
    DIRECTORY,
    CompressionRequest,
    InputError,
    make_request,
    make_settings,
    read_context,
    read_questions,
)
from softbatch.server.compressions.result import Finished, find_finished, previewed, register_once
from softbatch.server.compressions.run import run_compression
from softbatch.server.compressions.run_directory import PREVIEW, RESULT, discard, has_work, locked
from softbatch.server.settings import Settings
from softbatch.server.store_of_settings import store_of

_INTERRUPTED = 130


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
        return _compress(settings, options)
    except InputError as error:
        return _fail(f"{'--' if str(error).startswith('name: ') else ''}{error}")
    except (UsageError, SoftPromptError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))


def _fail(message: str) -> int:
    print(f"softbatch compress: {message}", file=sys.stderr)
    return 2


def _compress(settings: Settings, options: argparse.Namespace) -> int:
    request = _request(settings, options)
    disable_progress_bar()
    set_verbosity_error()
    registry = _registry(settings, options)
    directory = settings.store_root / DIRECTORY / options.name
    _check_name(registry, options, directory)
    view = ProgressView(Console(stderr=True))
    stop = _StopOnSignal()
    began = time.monotonic()
    try:
        max_bytes = min(request.max_prompt_bytes, registry.max_bytes())
        prepared = PreparedRun.checked(request, ModelFiles.open(request.choice), directory, max_bytes)
        with locked(directory):
            _check_no_work(options, directory)
            _describe(prepared, view)
            check_model = partial(registry.check_model, options.name)
            on_preview = partial(_register_preview, registry, options.name, view)
            with stop:
                finished = run_compression(
                    prepared, directory, options.resume, view, stop.was_asked, check_model, on_preview
                )
            view.close()
            registry.add(options.name, finished, previewed(directory))
            report = directory / "report"
            if options.report is not None:
                shutil.copytree(report, options.report, dirs_exist_ok=True)
                report = options.report
            discard(directory)
    except Stopped:
        view.note(f"stopped; nothing is lost: run the same command with --resume (work is kept in {directory})")
        if previewed(directory) is not None:
            view.note(f"the preview stays registered as {options.name} until then")
        return _INTERRUPTED
    except NameChanged as error:
        view.close()
        where = directory / RESULT
        return _fail(f"{error}; the trained one is in {where}: `softbatch prompts import` registers it")
    except (ModelError, ValueError, FloatingPointError) as error:
        view.close()
        return _fail(str(error))
    finally:
        view.close()
    _print_summary(options, settings, finished.report, report, time.monotonic() - began)
    return 0


def _request(settings: Settings, options: argparse.Namespace) -> CompressionRequest:
    """What the flags ask for. Raises UsageError or InputError."""
    wanted = make_settings(
        objective=options.objective,
        alpha=options.alpha,
        kind=options.kind,
        virtual_tokens=options.virtual_tokens,
        instruction=options.instruction,
        minutes=options.minutes,
        steps=options.steps,
        seed=options.training_seed,
        max_answer_tokens=options.answer_tokens,
        model_questions=options.model_questions,
    )
    if options.preview and options.server:
        raise UsageError(
            "--preview with --server: an upload takes no other's place; let the server compress (POST /v1/compressions "
            "with preview), or give the --prompt-store that it serves from"
        )
    if options.alpha is not None and options.objective != "mixed":
        raise UsageError(f"--alpha is for --objective mixed; {options.objective} has no use for it")
    context = read_context(options.context)
    questions = read_questions(options.questions) if options.questions else ()
    check_report(options.report)
    return make_request(
        name=options.name,
        context=context,
        settings=wanted,
        questions=questions,
        choice=lambda: choice_of(settings),
        store=settings.prompt_store,
        max_prompt_bytes=settings.max_prompt_mib << 20,
        keep_text=options.keep_text,
        recall=options.recall,
        preview=options.preview,
    )


def _register_preview(registry: Registry, name: str, view: ProgressView, preview: Finished) -> None:
    register_once(preview, lambda found: registry.add(name, found))
    view.note(f"a preview is registered as {name}; the trained one takes its place")


def _registry(settings: Settings, options: argparse.Namespace) -> Registry:
    if options.server:
        return RemoteRegistry(ServerClient(options.server, next(iter(settings.api_key), None)))
    return LocalRegistry(store_of(settings))


def _check_name(registry: Registry, options: argparse.Namespace, directory: Path) -> None:
    """Raises UsageError, SoftPromptError or NameTaken."""
    try:
        registry.check_free(options.name)
    except NameTaken:
        # A run that was killed between registering and clearing up registers the same again, which does no harm. The
        # preview of a run that was stopped is its own.
        is_own = has_work(directory) and registry.holds(options.name, directory / PREVIEW)
        if not is_own and not (options.resume and find_finished(directory)):
            raise


def _check_no_work(options: argparse.Namespace, directory: Path) -> None:
    if has_work(directory) and not options.resume:
        raise UsageError(
            f"unfinished work for {options.name} lies in {directory}: add --resume to go on with it, or delete "
            f"the directory{', and the preview,' if previewed(directory) else ''} to begin anew"
        )


def _describe(prepared: PreparedRun, view: ProgressView) -> None:
    """What the run begins with, and which of the user's answers it will cut."""
    request, tokenizer = prepared.request, prepared.model.tokenizer
    wanted, longest = request.settings, request.settings.max_answer_tokens
    tokens = prepared.context.num_tokens
    view.note(f"{tokens} tokens of context into {wanted.virtual_tokens} virtual tokens, {wanted.objective}")
    cut = sum(len(tokenizer.tokenize(one.output)) > longest for one in request.questions if one.output)
    if cut:
        view.note(f"note: {cut} of your answers are cut after {longest} tokens; --answer-tokens N takes more")


class _StopOnSignal:
    """The first Ctrl-C (or SIGTERM) asks the run to save and stop, the second ends it on the spot."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def was_asked(self) -> bool:
        return self._asked

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._ask)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping at the next safe point; once more ends it at once", file=sys.stderr)


def _print_summary(
    options: argparse.Namespace, settings: Settings, report: dict[str, Any], directory: Path, seconds: float
) -> None:
    console = Console()
    console.print(fidelity_table(report))
    if (answers := right_answers_table(report)) is not None:
        console.print(answers)
    # A run that older code finished has neither.
    if (verdict := report.get("verdict")) is not None:
        console.print(f"verdict: {verdict}", highlight=False, markup=False, soft_wrap=True)
    if (asked := report.get("coverage")) is not None:
        console.print(f"{asked['asked']} of {asked['sentences']} sentences were asked about", highlight=False)
    console.print(f"{report['compression_ratio']:g}x shorter, {duration(seconds)}", highlight=False)
    if report["segments"] > 1:
        console.print(
            f"the context is longer than the model's window and was cut into {report['segments']} parts: full context "
            "is the part that a question is about",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"report: {directory / 'report.html'}", highlight=False, soft_wrap=True)
    url = (options.server or f"http://127.0.0.1:{settings.port}").rstrip("/")
    start = "" if options.server else f"softbatch serve --prompt-store {settings.prompt_store} &\n"
    body = f'{{"model": "{options.name}", "messages": [{{"role": "user", "content": "…"}}]}}'
    console.print(
        f"registered as {options.name}; a first request:\n\n{start}"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
