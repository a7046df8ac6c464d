"""Tells an engine that hangs from one that is slow."""

from __future__ import annotations

from softbatch.scheduler.protocol import EngineConfig

# The engine's heartbeats come from a thread of their own: while a step runs, they come too.
SILENCE_SECONDS = 30.0
# Importing and loading may hold up that thread for longer.
SILENCE_SECONDS_AT_START = 300.0
SHORTEST_SILENCE = 3.0
TICK_SECONDS = 0.5
# For the default of --step-timeout: what even a slow machine, with others at work on it, computes in a second.
_SLOW_CPU_FLOPS, _SLOW_GPU_FLOPS = 10e9, 1e12
_STEP_SECONDS = 60.0


def seconds_of_full_step(config: EngineConfig, num_parameters: int, *, is_on_gpu: bool) -> float:
    """The longest that one step may take on a slow machine."""
    flops = 2.0 * num_parameters * config.max_batch_tokens
    return _STEP_SECONDS + flops / (_SLOW_GPU_FLOPS if is_on_gpu else _SLOW_CPU_FLOPS)


class Watchdog:
    """Counts only time during which this process ran too: if all were stopped together, nobody hangs."""

    def __init__(self) -> None:
        self._silence = 0.0
        self._step_seconds = 0.0
        self.max_silence = SILENCE_SECONDS_AT_START
        self.max_step = float("inf")

    def expect_steps(self, max_step: float) -> None:
        """From now on the engine serves."""
        self.max_step = max_step
        self.max_silence = min(SILENCE_SECONDS, max(max_step, SHORTEST_SILENCE))

    def heard(self, step_seconds: float = 0.0) -> None:
        """A message came; it says for how long the present step has been running."""
        self._silence = 0.0
        self._step_seconds = step_seconds

    def tick(self, seconds: float) -> None:
        """So many seconds have passed since the last tick."""
        self._silence += min(seconds, 2 * TICK_SECONDS)

    @property
    def complaint(self) -> str | None:
        """Why the engine counts as hung, if it does."""
        if self._silence > self.max_silence:
            return f"the engine has shown no sign of life for {self._silence:.0f} s"
        if self._step_seconds > self.max_step:
            return f"a step of the engine has been running for {self._step_seconds:.0f} s"
        return None
