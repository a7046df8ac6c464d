"""`softbatch score`: which of these answers would the model choose?"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from softbatch.prompt_store.control_tokens import ControlTokens
from softbatch.prompt_store.manifest import Replaces, SoftPromptError
from softbatch.prompt_store.soft_prompt_file import check_fits
from softbatch.prompt_store.template import render_chat
from softbatch.scheduler.model.source import ModelError
from softbatch.scheduler.protocol import SoftPromptRef
from softbatch.server.cli.model_flags import choice_of
from softbatch.server.cli.server_client import ServerClient
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.schemas.score import MAX_CANDIDATES
from softbatch.server.settings import Settings
from softbatch.server.store_of_settings import store_of


@dataclass(frozen=True)
class Scored:
    """`tokens` are (text, log-probability); `probability` is the share among the candidates."""

    text: str
    logprob: float
    probability: float
    tokens: list[tuple[str, float]]


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
        if len(options.candidate) > MAX_CANDIDATES:
            raise UsageError(f"--candidate: at most {MAX_CANDIDATES} can be compared, got {len(options.candidate)}")
        context = _context(options.context) if options.context else None
        scored = (_ask if options.server else _compute)(options, settings, context)
    except (UsageError, SoftPromptError, ModelError, ValueError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    _print(scored, options.json)
    return 0


def _fail(message: str) -> int:
    print(f"softbatch score: {message}", file=sys.stderr)
    return 2


def _context(path: Path) -> str:
    """Raises UsageError."""
    from softbatch.server.compressions.request import InputError, read_context

    try:
        return read_context(path)
    except InputError as error:
        raise UsageError(str(error)) from error


def _ask(options: argparse.Namespace, settings: Settings, context: str | None) -> list[Scored]:
    body = {
        "input": options.input,
        "candidates": options.candidate,
        "soft_prompt": options.soft_prompt,
        "context": context,
    }
    client = ServerClient(options.server, next(iter(settings.api_key), None))
    _, reply = client.call("POST", "/v1/score", {name: value for name, value in body.items() if value is not None})
    return [
        Scored(
            candidate["text"],
            candidate["logprob"],
            candidate["probability"],
            [(token["text"], token["logprob"]) for token in candidate["tokens"]],
        )
        for candidate in reply["candidates"]
    ]


def _compute(options: argparse.Namespace, settings: Settings, context: str | None) -> list[Scored]:
    """As the server does it: the same template, the same batches."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from softbatch.server.compressions.local_engine import LocalEngine
    from softbatch.server.compressions.prepare import ModelFiles

    disable_progress_bar()
    set_verbosity_error()
    choice, max_bytes = choice_of(settings), settings.max_prompt_mib << 20
    files = ModelFiles.open(choice)
    tokenizer = files.tokenizer
    store = store_of(settings) if options.soft_prompt else None
    stored = store.get(options.soft_prompt) if store is not None else None
    control = ControlTokens(tokenizer)
    shared = _prompt(tokenizer, control, options.input, context, stored.manifest.replaces if stored else "nothing")
    engine = LocalEngine(files, len(shared), 64, max_bytes)
    try:
        ref = None
        if store is not None and stored is not None:
            check_fits(stored.manifest, engine.ready.model.spec)
            manifest, path = stored.manifest, str(store.local_file(stored))
            has_keys = manifest.kind == "kv"
            ref = SoftPromptRef(stored.sha256, path, manifest.num_virtual_tokens, has_keys=has_keys)
        ending = engine.ready.model.eos_token_ids[:1]
        candidates = [[*control.encode(control.quote(text)), *ending] for text in options.candidate]
        for given, token_ids in (("--input or --context", shared), *(("--candidate", ids) for ids in candidates)):
            _check_tokens(given, token_ids, tokenizer, engine.ready.model.vocab_size)
        logprobs = engine.score(shared, candidates, ref)
    finally:
        engine.close()
    totals = [sum(part) for part in logprobs]
    return [
        Scored(text, total, share, [(tokenizer.decode([i]), p) for i, p in zip(ids, part, strict=True)])
        for text, ids, part, total, share in zip(
            options.candidate, candidates, logprobs, totals, _shares(totals), strict=True
        )
    ]


def _prompt(tokenizer: Any, control: ControlTokens, text: str, context: str | None, replaces: Replaces) -> list[int]:
    if not tokenizer.chat_template:
        raw = "\n\n".join(control.quote(part) for part in (context, text) if part)
        return control.encode(raw, add_special_tokens=replaces == "nothing")
    turns = [{"role": "user", "content": text}]
    if context is not None:
        turns.insert(0, {"role": "system", "content": context})
    return control.encode(render_chat(tokenizer, control.quote_turns(turns), replaces=replaces))


def _check_tokens(given: str, token_ids: Sequence[int], tokenizer: Any, rows: int) -> None:
    """Raises UsageError for a token that the tokenizer has, but the model has no embedding for."""
    wrong = next((token for token in token_ids if token >= rows), None)
    if wrong is not None:
        name = tokenizer.convert_ids_to_tokens(wrong)
        raise UsageError(f"{given}: the model has no token {wrong} ({name!r}): its token ids are 0 to {rows - 1}")


def _shares(logprobs: Sequence[float]) -> list[float]:
    """Probabilities normalised over the candidates."""
    most = max(logprobs)
    weights = [math.exp(logprob - most) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]


def _print(scored: list[Scored], as_json: bool) -> None:
    best = max(range(len(scored)), key=lambda index: scored[index].logprob)
    if as_json:
        candidates = [
            {
                "text": s.text,
                "logprob": s.logprob,
                "probability": s.probability,
                "tokens": [{"text": text, "logprob": logprob} for text, logprob in s.tokens],
            }
            for s in scored
        ]
        print(json.dumps({"best": best, "candidates": candidates}, indent=2, ensure_ascii=False))
        return
    table = Table()
    table.add_column("candidate")
    for heading in ("log Pr", "share", "tokens"):
        table.add_column(heading, justify="right")
    for index, candidate in enumerate(scored):
        style = "bold" if index == best else None
        figures = (f"{candidate.logprob:.3f}", f"{candidate.probability:.1%}", str(len(candidate.tokens)))
        table.add_row(candidate.text.replace("[", "\\["), *figures, style=style)
    console = Console()
    console.print(table)
    console.print(f"best: {scored[best].text}", highlight=False, markup=False, soft_wrap=True)
