"""The CPU kernels: C++ compiled for this machine at the first start, then kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.source import cache_directory

logger = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent / "csrc"
_SOURCES = sorted(_FOLDER.rglob("*.cpp"))
_LIBRARY = "softbatch_cpu.so"
_FLAGS = ("-O3", "-fopenmp")
_FLAGS_OF_MACHINE = {"native": ("-march=native",), "portable": ()}  # the second where a compiler lacks the first


def build(log: logging.Logger = logger) -> bool:
    """Loads the kernels, which ops.py names, compiled if need be; False, after one warning that says why, where
    that is not possible.

    Processes that start at the same time each compile their own copy; the last to finish leaves its in the cache.
    """
    if not is_loaded():
        try:
            library = _cached_library()
            with contextlib.suppress(OSError):  # not there yet, or damaged
                if library is not None:
                    torch.ops.load_library(library)
            if not is_loaded():
                log.info("compiling the CPU kernels: about a minute, only at the first start")
                started = time.monotonic()
                _compile(library)
                log.info("compiled the CPU kernels in %.0f seconds", time.monotonic() - started)
        except (OSError, RuntimeError, ImportError) as error:
            log.warning(
                "the CPU kernels cannot be built (%s): the model runs in plain torch, several times slower. "
                "Install a C++ compiler (Debian, Ubuntu: g++; Fedora: gcc-c++), ninja and setuptools, and restart.",
                _first_error(error),
            )
            return False
    return True


def is_loaded() -> bool:
    return ops.are_loaded()


def is_kept() -> bool:
    """Whether `build` need not compile."""
    library = _cached_library()
    return is_loaded() or (library is not None and library.exists())


def _cached_library() -> Path | None:
    """Where the compiled library is kept; None where no directory can be made for it."""
    digest = hashlib.sha256(f"{torch.__version__} {_FLAGS} {_cpu()}".encode())
    for source in sorted([*_SOURCES, *_FOLDER.rglob("*.h")]):
        digest.update(source.read_bytes())
    with contextlib.suppress(OSError, RuntimeError):  # no right to write there; no home directory
        directory = cache_directory() / "kernels" / digest.hexdigest()[:16]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory / _LIBRARY
    return None


def _cpu() -> str:
    """The processor's instruction sets: a cache that several machines share must not mix them up."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {' '.join(sorted(flags.split()))}"


def _compile(library: Path | None) -> None:
    """Compiles and loads the kernels, in a directory of its own; then moves it to `library`, in one step.

    Raises OSError, ImportError or RuntimeError, the last with the compiler's output.
    """
    from torch.utils import cpp_extension

    compiler: str = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler: {compiler} is not on the PATH")
    with (
        tempfile.TemporaryDirectory(prefix=".building-", dir=library.parent if library else None) as directory,
        _ninja_on_path(),
    ):
        for name, flags in _FLAGS_OF_MACHINE.items():
            try:
                cpp_extension.load(
                    name=name,
                    sources=[str(source) for source in _SOURCES],
                    extra_cflags=[*_FLAGS, *flags],
                    extra_ldflags=["-fopenmp"],
                    extra_include_paths=[str(_FOLDER)],
                    build_directory=directory,
                    is_python_module=False,
                )
            except RuntimeError:
                if name == list(_FLAGS_OF_MACHINE)[-1]:
                    raise
                continue
            if library is not None:
                os.replace(Path(directory, name + cpp_extension.LIB_EXT), library)
            return


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Lets torch find the ninja installed beside this Python, even where its environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _first_error(error: Exception) -> str:
    """The line that tells most: a compiler's first error, or else the exception's first line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines[1:] if "error:" in line), lines[0]).strip()
