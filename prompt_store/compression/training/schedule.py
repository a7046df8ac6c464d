"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate_factor(fraction: float, warmup: float, final: float) -> float:
    """Linear warm-up over the first `warmup` of the run, then a cosine down to `final`; fraction in [0,
    1]."""
    if fraction < warmup:
        return max(fraction / warmup, 0.05)
    rest = min(1.0, (fraction - warmup) / (1.0 - warmup))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * rest))
