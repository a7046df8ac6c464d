"""Who may be replayed together after the engine has died, who alone, and who not again."""

from __future__ import annotations

from collections.abc import Iterable

from softbatch.server.requests.active_request import ActiveRequest

# A request that lives for so long behind its first token from an engine has survived whatever it brings.
SURVIVAL_SECONDS = 2.0
DEATHS_BEFORE_TRIAL = 2


class Quarantine:
    """Finds the request that kills engines, if there is one, without ever blaming its companions.

    A death strikes a request that the engine has computed for, but that has not survived yet. Struck by two deaths in a
    row, it is on trial: replayed with nobody beside it. Another death convicts it; survival acquits it.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.on_trial: ActiveRequest | None = None
        self._proven_soft_prompts: set[str] = set()
        self._proven_grammars: set[str] = set()

    def admitted(self, request: ActiveRequest) -> None:
        """Its soft prompt was loaded, and its grammar compiled, without harm."""
        if request.add.params.grammar:
            self._proven_grammars.add(request.add.params.grammar)
        if request.add.soft_prompt is not None:
            self._proven_soft_prompts.add(request.add.soft_prompt.sha256)

    def engine_died(self, active: Iterable[ActiveRequest], now: float) -> ActiveRequest | None:
        """Count the death for everyone it strikes; returns the one whom it convicts."""
        convicted, self.on_trial = self.on_trial, None
        active = list(active)
        has_slot = sum(request.state == "running" for request in active) < self._slots
        for request in active:
            if request.state == "running" or self._is_prepared(request, has_slot):
                request.deaths = 0 if self.has_survived(request, now) else request.deaths + 1
        self._proven_soft_prompts.clear()
        self._proven_grammars.clear()
        return convicted if convicted is not None and convicted.deaths > DEATHS_BEFORE_TRIAL else None

    def next_to_run(self, active: Iterable[ActiveRequest]) -> list[ActiveRequest]:
        """Those to send to the engine now: the next one on trial, or everybody who is not there yet."""
        held = [request for request in active if request.sequence_id is None]
        self.on_trial = next((request for request in held if request.deaths >= DEATHS_BEFORE_TRIAL), None)
        return held if self.on_trial is None else [self.on_trial]

    def has_survived(self, request: ActiveRequest, now: float) -> bool:
        return request.alive_since is not None and now - request.alive_since > SURVIVAL_SECONDS

    def _is_prepared(self, request: ActiveRequest, has_slot: bool) -> bool:
        """Whether it waits in the engine for a grammar or a soft prompt that nobody has used there yet. Without a free
        slot, no soft prompt is loaded."""
        if request.sequence_id is None:
            return False
        soft_prompt, grammar = request.add.soft_prompt, request.add.params.grammar
        is_new = soft_prompt is not None and soft_prompt.sha256 not in self._proven_soft_prompts
        return (has_slot and is_new) or (grammar != "" and grammar not in self._proven_grammars)
