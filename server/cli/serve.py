"""`softbatch serve`: check the settings, take the port, start the engine, serve until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from softbatch.server.app import create_app
from softbatch.server.cli.settings_flags import UsageError, add_flags, settings_from
from softbatch.server.requests.engine_supervisor import StartupError
from softbatch.server.services import Services, running_services
from softbatch.server.settings import Settings

logger = logging.getLogger(__name__)
BACKLOG = 2048
# Clients that are told that their request was cut off get so long to hear it.
FAREWELL_SECONDS = 1.0


class UnfinishedRequests(Exception):
    """The server ended before all requests were finished; the message says why."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. Every flag can also be set through the environment.",
    )
    add_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        settings = settings_from(options)
        listener = _listen(settings)
        # Until it serves: an exception lets the engine and the temporary files go; the default would end the process on
        # the spot.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, listener))
    except (UsageError, StartupError) as error:
        print(f"softbatch serve: {error}", file=sys.stderr)
        return 2
    except UnfinishedRequests as error:
        print(f"softbatch serve: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(settings: Settings, listener: socket.socket) -> None:
    async with running_services(settings) as services:
        config = uvicorn.Config(
            create_app(services),
            lifespan="off",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
        )
        logger.info("serving %s on http://%s:%d", services.model_name, settings.host, listener.getsockname()[1])
        server = DrainingServer(config, services)
        services.engine.on_give_up = server.give_up
        await server.serve(sockets=[listener])
        if services.supervisor.gave_up:
            raise UnfinishedRequests("the engine could not be kept alive; see the log above")
        if server.was_cut_short:
            raise UnfinishedRequests("ended before all requests were finished")


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


def _listen(settings: Settings) -> socket.socket:
    """Take the port before the model is loaded, so that a taken one is told at once. Raises StartupError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --host or --port"
        ) from error
    return listener  # not listening yet: until the model is loaded, clients are refused rather than kept waiting
