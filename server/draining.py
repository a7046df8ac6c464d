"""The end of a server: what runs is finished, within a time, and whoever is cut off hears of it."""

from __future__ import annotations

import asyncio
from types import FrameType

import uvicorn

from softbatch.server.services import Services

# Clients that are told that their request was cut off get so long to hear it.
FAREWELL_SECONDS = 1.0


class DrainingServer(uvicorn.Server):
    """Told to stop, it admits nothing any more and finishes what runs, within --drain-timeout; told so again, it ends
    at once. Whoever is cut off hears of it."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services
        self._loop = asyncio.get_running_loop()
        self.was_cut_short = False

    def give_up(self) -> None:
        self._stop()
        self._cut_short()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._on_signal)  # not in the middle of whatever the signal has interrupted

    def _on_signal(self) -> None:
        if not self.should_exit:
            self._stop()
            self._loop.call_later(self._services.settings.drain_timeout, self._cut_short)
        else:
            self._cut_short()

    def _stop(self) -> None:
        self._services.admission.draining = True
        self.should_exit = True

    def _cut_short(self) -> None:
        """Running requests are answered with an error; what has not ended soon behind that is cancelled."""
        self.was_cut_short |= bool(self._services.engine.active or self.server_state.tasks)
        self._services.engine.fail_all("the server was stopped before this request was finished")
        self._loop.call_later(FAREWELL_SECONDS, setattr, self, "force_exit", True)
