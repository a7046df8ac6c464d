"""The CPU kernels: those that the wheel brings, or else compiled for this machine at the first start and then kept."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import torch

from softbatch.scheduler.model.cpu import ops, prebuilt
from softbatch.scheduler.model.cpu.compiler import compile_library
from softbatch.scheduler.model.source import cache_directory

logger = logging.getLogger(__name__)
_BUILDING = threading.Lock()
_LIBRARY = "softbatch_cpu.so"
_FLAGS_OF_MACHINE = (("-march=native",), ())  # the second where a compiler lacks the first


def build(log: logging.Logger = logger) -> bool:
    """Loads the kernels, which ops.py names, compiled if need be; False, after one warning that says why, where
    that is not possible.

    Processes that start at the same time each compile their own copy; the last to finish leaves its in the cache.
    """
    with _BUILDING:
        return _build(log)


def begin_to_build(log: logging.Logger = logger) -> None:
    """If the kernels have to be compiled, that begins in a thread, and `build` waits for it."""
    if not needs_no_compiler() and not _BUILDING.locked():
        threading.Thread(target=build, args=(log,), daemon=True, name="kernels").start()


@cache
def _build(log: logging.Logger) -> bool:
    """Once: what could not be compiled cannot be compiled a moment later."""
    if not is_loaded() and not _load_prebuilt(log):
        try:
            library = _cached_library()
            with contextlib.suppress(OSError):  # not there yet, or damaged
                if library is not None:
                    torch.ops.load_library(library)
                    log.info("CPU kernels: compiled for this processor at an earlier start")
            if not is_loaded():
                log.info("compiling the CPU kernels: about a minute, only at the first start")
                started = time.monotonic()
                _compile(library)
                log.info("compiled the CPU kernels in %.0f seconds", time.monotonic() - started)
        except (OSError, RuntimeError, ImportError) as error:
            log.warning(
                "the CPU kernels cannot be built (%s): the model runs in plain torch, several times slower. "
                "Install a C++ compiler (Debian, Ubuntu: g++; Fedora: gcc-c++), and restart.",
                _first_error(error),
            )
            return False
    return True


def is_loaded() -> bool:
    return ops.are_loaded()


def find_prebuilt() -> prebuilt.Found:
    """Those that the wheel brings for this machine and this torch."""
    key = prebuilt.Key.of(torch.__version__, torch.compiled_with_cxx11_abi())
    return prebuilt.find(key, prebuilt.processor_flags())


def is_compiled() -> bool:
    """Whether an earlier start has left kernels for this machine."""
    library = _cached_library()
    return library is not None and library.exists()


def needs_no_compiler() -> bool:
    return is_loaded() or find_prebuilt().library is not None or is_compiled()


def _load_prebuilt(log: logging.Logger) -> bool:
    """False where there are none that can be loaded; then the log says why, if the wheel has any."""
    found = find_prebuilt()
    if found.library is not None:
        try:
            torch.ops.load_library(found.library)
        except OSError as error:  # an older C library than where they were compiled
            log.info("the prebuilt kernels cannot be loaded: %s", error)
        else:
            log.info("CPU kernels: %s", found.told)
            return True
    elif found.told:
        log.info(found.told)
    return False


def _cached_library() -> Path | None:
    """Where the compiled library is kept; None where no directory can be made for it."""
    digest = hashlib.sha256(f"{torch.__version__} {prebuilt.FLAGS} {_cpu()}".encode() + prebuilt.content_of_sources())
    with contextlib.suppress(OSError, RuntimeError):  # no right to write there; no home directory
        directory = cache_directory() / "kernels" / digest.hexdigest()[:16]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory / _LIBRARY
    return None


def _cpu() -> str:
    """The processor's instruction sets: a cache that several machines share must not mix them up."""
    return f"{platform.machine()} {' '.join(sorted(prebuilt.processor_flags())) or platform.processor()}"


def _compile(library: Path | None) -> None:
    """Compiles and loads the kernels, in a directory of its own; then moves it to `library`, in one step.

    Raises OSError, ImportError or RuntimeError, the last with the compiler's output.
    """
    with tempfile.TemporaryDirectory(prefix=".building-", dir=library.parent if library else None) as directory:
        for flags in _FLAGS_OF_MACHINE:
            try:
                compiled = compile_library(Path(directory), _LIBRARY, flags)
            except RuntimeError:
                if flags == _FLAGS_OF_MACHINE[-1]:
                    raise
                continue
            torch.ops.load_library(compiled)
            if library is not None:
                os.replace(compiled, library)
            return


def _first_error(error: Exception) -> str:
    """The line that tells most: a compiler's first error, or else the exception's first line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines[1:] if "error:" in line), lines[0]).strip()
