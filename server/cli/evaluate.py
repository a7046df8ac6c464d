"""`softbatch evaluate`: how faithful a registered soft prompt is on questions of one's own."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from softbatch.prompt_store.compression.evaluation.report import write_report
from softbatch.prompt_store.compression.frozen.tokenized_context import sha256_of
from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.scheduler.model.source import ModelError
from softbatch.server.cli.fidelity_table import fidelity_table, right_answers_table
from softbatch.server.cli.model_flags import check_report, choice_of
from softbatch.server.cli.progress_bars import ProgressView
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.compressions.evaluation_run import evaluate
from softbatch.server.compressions.request import InputError, read_context, read_questions
from softbatch.server.store_of_settings import store_of


def run(options: argparse.Namespace) -> int:
    try:
        _evaluate(options)
    except (UsageError, InputError, SoftPromptError, ModelError, ValueError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    return 0


def _fail(message: str) -> int:
    print(f"softbatch evaluate: {message}", file=sys.stderr)
    return 2


def _evaluate(options: argparse.Namespace) -> None:
    settings = settings_from(options)
    context, questions = read_context(options.context), read_questions(options.questions)
    check_report(options.report)
    store = store_of(settings)
    made_of = store.get(options.name).manifest.context
    disable_progress_bar()
    set_verbosity_error()
    view = ProgressView(Console(stderr=True))
    if made_of is not None and made_of.sha256 != sha256_of(context):
        view.note(f"note: {options.name} was made of another text than {options.context}")
    try:
        report = evaluate(store, options.name, context, questions, choice_of(settings), view)
    finally:
        view.close()
    Console().print(fidelity_table(report))
    if (answers := right_answers_table(report)) is not None:
        Console().print(answers)
    if options.report is not None:
        write_report(report, options.report, options.name)
        Console().print(f"report: {options.report / 'report.html'}", highlight=False, soft_wrap=True)
