"""When a request has to be answered, and what becomes of one that is late."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Deadline:
    """Shared by all choices of one HTTP request; `at` is in monotonic seconds.

    `has_output` is set with the first token of any of them. From then on a choice that is late ends with the tokens it
    has, perhaps none; before, it fails.
    """

    at: float
    seconds: float
    has_output: bool = False
