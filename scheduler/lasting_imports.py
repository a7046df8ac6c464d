"""Imports of whole libraries: hundreds of thousands of objects that stay until the process ends."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_for_good(package: str) -> Iterator[None]:
    """What is there at the end of the block is never looked through for garbage: neither while it grows, which would
    take a good part of the imports' time, nor in the middle of a step later on. It changes nothing for a `package` that
    is there already, for then other things may be that do not stay."""
    if package in sys.modules:
        yield
        return
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
