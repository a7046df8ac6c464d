"""`softbatch prompts`: the soft prompts of a store, without a server."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from softbatch.prompt_store.compression.data.context_text import ContextTextError, decode_context
from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.kept_text import DEFAULT_RECALL, KeptText, check_kept
from softbatch.prompt_store.stores.store import SoftPromptStore, StoredPrompt
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.request_failures import printable
from softbatch.server.settings import Settings
from softbatch.server.store_of_settings import store_of

# Of a manifest's figures, those that say how far the soft prompt can be trusted.
_FIDELITY = {
    "kl_closed": "KL closed (1 is the full context)",
    "top1_agreement": "top-1 agreement",
    "token_f1": "F1 of free answers",
}
_TRAINING = ("steps", "questions", "minutes")
_MAX_VERDICT_CHARS = 80


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
        store = store_of(settings)
        _ACTIONS[options.action](store, settings, options)
    except (UsageError, SoftPromptError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
    return 0


def _fail(message: str) -> int:
    print(f"softbatch prompts: {message}", file=sys.stderr)
    return 2


def _list(store: SoftPromptStore, settings: Settings, options: argparse.Namespace) -> None:
    rows = [_row(stored) for stored in store.list()]
    if not rows:
        print(f"no soft prompts in {settings.prompt_store}; `softbatch prompts import` adds one")
    else:
        header = ("NAME", "KIND", "VIRTUAL", "CONTEXT", "SIZE", "MODEL", "CREATED", "VERDICT")
        table = [header, *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, reason in store.broken():
        print(f"softbatch prompts: {name} cannot be used: {reason}", file=sys.stderr)


def _row(stored: StoredPrompt) -> tuple[str, ...]:
    manifest = stored.manifest
    cells = (
        stored.name,
        manifest.kind,
        str(manifest.num_virtual_tokens),
        f"{manifest.context.num_tokens} tokens" if manifest.context else "-",
        f"{stored.num_bytes / 2**20:.1f} MiB",
        manifest.model.name,
        _local_time(manifest.created_at),
        _verdict(manifest.fidelity.get("verdict")),
    )
    return tuple(map(printable, cells))


def _verdict(found: object) -> str:
    """Of whatever an imported file says, as much as a table has room for."""
    said = found.split(" (")[0].split(";")[0] if isinstance(found, str) else "-"
    return said if len(said) <= _MAX_VERDICT_CHARS else said[:_MAX_VERDICT_CHARS] + "…"


def _show(store: SoftPromptStore, settings: Settings, options: argparse.Namespace) -> None:
    stored = store.get(options.name)
    if options.json:
        shown = {"name": stored.name, "sha256": stored.sha256, "bytes": stored.num_bytes}
        print(json.dumps(shown | stored.manifest.model_dump(mode="json"), indent=2))
        return
    lines = _summary(stored)
    width = max(map(len, lines))
    for title, value in lines.items():
        print(f"{title.ljust(width)}  {printable(value)}")


def _summary(stored: StoredPrompt) -> dict[str, str]:
    """What decides whether to use it; what the file does not say is left out."""
    manifest = stored.manifest
    lines = {
        "name": stored.name,
        "kind": manifest.kind,
        "model": f"{manifest.model.name} (fingerprint {manifest.model.fingerprint[:12]})",
        "virtual tokens": str(manifest.num_virtual_tokens),
    }
    if manifest.context is not None:
        tokens = manifest.context.num_tokens
        shorter = tokens / manifest.num_virtual_tokens
        lines["context"] = f"{tokens} tokens, {shorter:.1f}x shorter (sha256 {manifest.context.sha256[:12]})"
    if manifest.preview_of is not None:
        lines["preview"] = f"of {manifest.preview_of}; when that ends, the trained one takes its place"
    lines["stands for"] = "the system turn" if manifest.replaces == "system" else "text before everything else"
    if manifest.objective is not None:
        lines["objective"] = manifest.objective
    training = {name: manifest.training.get(name) for name in _TRAINING}
    if known := [f"{value:g} {name}" for name, value in training.items() if isinstance(value, int | float)]:
        lines["training"] = ", ".join(known)
    for name, title in _FIDELITY.items():
        if isinstance(value := manifest.fidelity.get(name), int | float):
            lines[title] = f"{value:.3f}"
    if stored.recall is not None:
        lines["text"] = f"kept; {stored.recall} passages are recalled where a request does not say"
    return lines | {
        "size": f"{stored.num_bytes / 2**20:.1f} MiB",
        "made by": manifest.source,
        "created": _local_time(manifest.created_at),
        "sha256": stored.sha256,
        "file": str(stored.path),
    }


def _local_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _import(store: SoftPromptStore, settings: Settings, options: argparse.Namespace) -> None:
    from softbatch.prompt_store.peft import import_peft, looks_like_peft_zip
    from softbatch.prompt_store.soft_prompt_file import save
    from softbatch.scheduler.model.source import resolve
    from softbatch.scheduler.model.weight_files import stored_weight

    store.check_free(options.name)
    kept = _kept(options)
    if options.file.is_dir() or looks_like_peft_zip(options.file):
        spec = _spec_of(settings.model)
        base_weight = partial(stored_weight, resolve(settings.model).path)
        prompt = import_peft(options.file, spec, settings.max_prompt_mib << 20, base_weight)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "imported.safetensors"
            save(prompt, path)
            stored = store.add(options.name, path, kept=kept)
    else:
        stored = store.add(options.name, options.file, kept=kept)
    print(f"{stored.name}: {stored.manifest.num_virtual_tokens} virtual tokens, kind {stored.manifest.kind}")


def _kept(options: argparse.Namespace) -> KeptText | None:
    """Raises UsageError or SoftPromptError."""
    if options.keep_text is None:
        if options.recall is not None:
            raise UsageError("--recall is for soft prompts with --keep-text")
        return None
    try:
        text = decode_context(options.keep_text.read_bytes())
    except ContextTextError as error:
        raise UsageError(f"--keep-text {options.keep_text}: {error}") from None
    kept = KeptText(text=text, recall=DEFAULT_RECALL if options.recall is None else options.recall)
    check_kept(kept)
    return kept


def _export(store: SoftPromptStore, settings: Settings, options: argparse.Namespace) -> None:
    if options.file.exists():
        raise UsageError(f"{options.file} exists already; name a file that does not")
    store.export(options.name, options.file)


def _remove(store: SoftPromptStore, settings: Settings, options: argparse.Namespace) -> None:
    store.remove(options.name)


def _spec_of(model: str) -> ModelSpec:
    import torch

    from softbatch.scheduler.model.loader import load_transformers, spec_of
    from softbatch.scheduler.model.source import ModelError, resolve

    try:
        source = resolve(model)
        loaded, tokenizer = load_transformers(source, torch.bfloat16, torch.device("cpu"))
    except ModelError as error:
        raise UsageError(str(error)) from error
    return spec_of(source.name, loaded, tokenizer)


_ACTIONS: Mapping[str, Callable[[SoftPromptStore, Settings, argparse.Namespace], None]] = {
    "list": _list,
    "show": _show,
    "import": _import,
    "export": _export,
    "remove": _remove,
}
