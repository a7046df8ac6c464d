"""How many tokens a step may compute so that nobody waits long for its end."""

from __future__ import annotations

# Prefills get so many tokens of a step however slow the model is, and more beside many sequences that decode: fewer
# would cost throughput, and leave slots empty.
LEAST = 32
LEAST_PER_DECODE = 4
_FIRST = 256
# While prompts wait behind the longest one, a step may take so many times the target, as far as those take so many
# times as long as it: each chunk has its price, and whoever waits pays it.
STRETCH = 6
_OF_ALL_BEHIND = 8
# Limits are multiples of this, and stay while a step of that size is expected to take this part of the target or more.
_GRAIN = 16
_ENOUGH = 0.7
# Steps that a limit is told from; one of them alone at most doubles or halves it.
_REMEMBERED = 8


class StepPace:
    """Finds how large steps may be to take `target` seconds, from how long the full ones took; never above `most`.

    A prompt that arrives waits for the end of the step in flight, and a sequence that decodes gets one token in each.
    But every chunk of a prefill costs a little more than its part of a larger one.
    """

    def __init__(self, target: float | None, most: int) -> None:
        self._target = target
        self._most = most
        self._limit = most if target is None else min(most, _FIRST)
        self._fitting = 0.0  # tokens
        self._observed = 0

    def for_prefills(
        self, num_decodes: int, shared: int | None = None, *, background: bool = False, behind: int = 0
    ) -> int:
        """How many tokens prefills may take beside so many decodes; `shared`: at most so many, for other owners' sake;
        `background`: nobody waits for them, and somebody who does may come during the step; `behind`: so many tokens
        of prompts wait for others to be computed."""
        left = self._most - num_decodes
        if background and self._target is not None:
            return min(left, LEAST)
        limit = self._limit
        if limit <= self._fitting:  # on a slow machine LEAST alone takes longer than the target
            limit = max(limit, min(STRETCH * limit, behind // _OF_ALL_BEHIND))
        left = min(left, max(LEAST, LEAST_PER_DECODE * num_decodes, limit - num_decodes))
        return left if shared is None else min(left, shared)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long; only one that filled its limit says anything."""
        if self._target is None or num_tokens < self._limit:
            return
        fitting = num_tokens * self._target / max(seconds, 1e-9)
        if self._observed:
            fitting = min(max(fitting, self._limit / 2), self._limit * 2)
        self._observed = min(self._observed + 1, _REMEMBERED)
        self._fitting += (fitting - self._fitting) / self._observed
        if not _ENOUGH * self._fitting <= self._limit <= self._fitting:
            wanted = int(0.9 * self._fitting) // _GRAIN * _GRAIN
            self._limit = min(self._most, max(LEAST, wanted))
