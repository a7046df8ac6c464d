"""`softbatch prompts`: the soft prompts of a store, without a server."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.directory import PromptStore, StoredPrompt
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.settings import Settings


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prompts",
        help="list, show, import, export or remove registered soft prompts",
        description="Work on a prompt store directly; a running server with the same store sees every change.",
    )
    store = argparse.ArgumentParser(add_help=False)
    for name in ("prompt_store", "max_prompt_mib"):
        field = Settings.model_fields[name]
        store.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar="DIR" if name == "prompt_store" else "N",
            help=f"{field.description} (default: {field.default}) [SOFTBATCH_{name.upper()}]",
        )
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    listing = actions.add_parser("list", parents=[store], help="one line for each soft prompt")
    listing.set_defaults(run=_run, action=_list)

    show = actions.add_parser("show", parents=[store], help="everything known about one")
    show.add_argument("name")
    show.set_defaults(run=_run, action=_show)

    importing = actions.add_parser(
        "import",
        parents=[store],
        help="register a soft prompt file or a PEFT adapter",
        description="FILE is a softbatch .safetensors file, a PEFT adapter folder, or a zip of one.",
    )
    importing.add_argument("file", type=Path)
    importing.add_argument("--name", required=True, help="what requests call it")
    importing.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="the model a PEFT adapter was trained on; it is loaded to check that the adapter fits "
        f"(default: {Settings.model_fields['model'].default}) [SOFTBATCH_MODEL]",
    )
    importing.set_defaults(run=_run, action=_import)

    export = actions.add_parser("export", parents=[store], help="copy a soft prompt to a file")
    export.add_argument("name")
    export.add_argument("file", type=Path)
    export.set_defaults(run=_run, action=_export)

    remove = actions.add_parser("remove", parents=[store], help="unregister a soft prompt and delete its file")
    remove.add_argument("name")
    remove.set_defaults(run=_run, action=_remove)


def _run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
        store = PromptStore(settings.prompt_store, settings.max_prompt_mib << 20)
        options.action(store, settings, options)
    except (UsageError, SoftPromptError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
    return 0


def _fail(message: str) -> int:
    print(f"softbatch prompts: {message}", file=sys.stderr)
    return 2


def _list(store: PromptStore, settings: Settings, options: argparse.Namespace) -> None:
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
    return (
        stored.name,
        manifest.kind,
        str(manifest.num_virtual_tokens),
        f"{manifest.context.num_tokens} tokens" if manifest.context else "-",
        f"{stored.num_bytes / 2**20:.1f} MiB",
        manifest.model.name,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.created_at)),
        str(manifest.fidelity.get("verdict", "-")).split(" (")[0].split(";")[0],
    )


def _show(store: PromptStore, settings: Settings, options: argparse.Namespace) -> None:
    stored = store.get(options.name)
    shown = {"name": stored.name, "sha256": stored.sha256, "bytes": stored.num_bytes}
    print(json.dumps(shown | stored.manifest.model_dump(mode="json"), indent=2))


def _import(store: PromptStore, settings: Settings, options: argparse.Namespace) -> None:
    from softbatch.prompt_store.peft import import_peft, looks_like_peft_zip
    from softbatch.prompt_store.soft_prompt_file import save

    store.check_free(options.name)
    if options.file.is_dir() or looks_like_peft_zip(options.file):
        prompt = import_peft(options.file, _spec_of(settings.model), settings.max_prompt_mib << 20)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "imported.safetensors"
            save(prompt, path)
            stored = store.add(options.name, path)
    else:
        stored = store.add(options.name, options.file)
    print(f"{stored.name}: {stored.manifest.num_virtual_tokens} virtual tokens, kind {stored.manifest.kind}")


def _export(store: PromptStore, settings: Settings, options: argparse.Namespace) -> None:
    if options.file.exists():
        raise UsageError(f"{options.file} exists already; name a file that does not")
    store.export(options.name, options.file)


def _remove(store: PromptStore, settings: Settings, options: argparse.Namespace) -> None:
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
