"""Flags that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


def names_of(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """Parses "a,b", each of which must be one of `allowed`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r}: there are {', '.join(allowed)}")
        return names

    return parse
