"""`softbatch doctor`: what this machine can do, and what would make it faster."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.scheduler.model.cpu import build, ops
from softbatch.scheduler.model.model_error import ModelError
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, cache_directory, is_embedded_here, resolve
from softbatch.scheduler.model.weight_files import num_stored
from softbatch.server.cli.machine import GIB, Finding, State, gpu, memory, processor, threads
from softbatch.server.cli.settings_flags import UsageError, settings_from
from softbatch.server.settings import Settings
from softbatch.server.store_of_settings import store_of

SPARE_DISK_GIB = 2.0
PROBE_BYTES = 256 << 20  # far more than any cache holds
PROBES = 5


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
    except UsageError as error:
        print(f"softbatch doctor: {error}", file=sys.stderr)
        return 2
    findings = list(examine(settings))
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return int(any(finding.state == State.BROKEN for finding in findings))


def examine(settings: Settings) -> Iterator[Finding]:
    """Everything that decides whether this machine serves, and how fast."""
    yield processor()
    yield threads()
    yield memory()
    yield gpu()
    yield _kernels()
    yield _prompt_store(settings)
    yield _directory("cache", cache_directory(), "XDG_CACHE_HOME")
    yield from _pace(settings)


def _print(findings: list[Finding]) -> None:
    console, marks = Console(), {State.GOOD: ("✓", "green"), State.SLOW: ("!", "yellow"), State.BROKEN: ("✗", "red")}
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        mark, colour = marks[finding.state]
        console.print(
            Text(f"{mark} ", style=colour) + Text(f"{finding.about.ljust(width)}  {finding.found}"), soft_wrap=True
        )
        if finding.advice:
            console.print(Text(f"{'':{width + 4}}{finding.advice}", style=colour), soft_wrap=True)


def _kernels() -> Finding:
    found = build.find_prebuilt()
    if found.library is not None:
        return Finding("kernels", f"{found.told}: no compiler is needed")
    why = f"; {found.told}" if found.told else ""
    if build.is_compiled():
        return Finding("kernels", f"compiled for this processor, and kept{why}")
    from torch.utils.cpp_extension import get_cxx_compiler

    compiler = str(get_cxx_compiler())
    if shutil.which(compiler) is None:
        advice = "models run in plain torch, several times slower; install g++ (Debian, Ubuntu) or gcc-c++ (Fedora)"
        return Finding("kernels", f"no C++ compiler: {compiler} is not on the PATH{why}", State.SLOW, advice)
    return Finding("kernels", f"{compiler} compiles them at the first start, in about a minute{why}")


def _prompt_store(settings: Settings) -> Finding:
    if isinstance(settings.prompt_store, Path):
        return _directory("prompt store", settings.prompt_store, "--prompt-store")
    try:
        store = store_of(settings)
        count = len(store.list())
    except (SoftPromptError, OSError) as error:
        advice = "see docs/guides/object-store.md for addresses, credentials and permissions"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return Finding("prompt store", f"{settings.prompt_store}: {reason}", State.BROKEN, advice)
    return Finding("prompt store", f"{settings.prompt_store}: reached, {count} soft prompts; copies in {store.root}")


def _directory(about: str, path: Path, setting: str) -> Finding:
    """Whether files can be made there, and how much room there is."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free / GIB
    except OSError as error:
        advice = f"give a directory that can be written with {setting}"
        return Finding(about, f"{path}: {error.strerror}", State.BROKEN, advice)
    if free < SPARE_DISK_GIB:
        return Finding(about, f"{path}: {free:.1f} GiB free", State.SLOW, f"free some, or set {setting}")
    return Finding(about, f"{path}: {free:.0f} GiB free")


def _pace(settings: Settings) -> Iterator[Finding]:
    """The most tokens a second that one request can get: each token reads all weights once."""
    if torch.cuda.is_available():
        return
    bandwidth = _read_bandwidth()
    yield Finding("memory bandwidth", f"{bandwidth / 1e9:.1f} GB/s read by {torch.get_num_threads()} threads")
    known = is_embedded_here() if settings.model == EMBEDDED_ALIAS else Path(settings.model).expanduser().exists()
    if not known:
        yield Finding("model", f"{settings.model}: not looked at, as it may have to be downloaded")
        return
    try:
        count = num_stored(resolve(settings.model).path)
    except ModelError as error:
        yield Finding("model", str(error), State.BROKEN, "softbatch serve would say the same")
        return
    loaded = build.needs_no_compiler() and build.build()
    width = 4.0 if settings.dtype == "float32" else 1.5 if loaded and ops.has_12_bits() else 2.0
    most = bandwidth / (count * width)
    found = f"{settings.model}: {count / 1e6:.0f} million parameters, at most {most:.0f} tokens/s for one request"
    yield Finding("model", f"{found}; softbatch bench measures what it is")


def _read_bandwidth() -> float:
    """Bytes a second; the best of a few looks, as others may be reading too."""
    numbers = torch.ones(PROBE_BYTES // 4)
    best = 0.0
    for _ in range(PROBES):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, PROBE_BYTES / (time.perf_counter() - started))
    return best
