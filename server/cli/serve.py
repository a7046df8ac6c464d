"""`softbatch serve`: check the settings, take the port, start the engine, serve until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator

from softbatch.scheduler.engine.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from softbatch.scheduler.lasting_imports import importing_for_good
from softbatch.server.cli.settings_flags import UsageError, settings_from, warn_of_unknown_variables
from softbatch.server.requests.engine_supervisor import StartupError
from softbatch.server.settings import Settings

logger = logging.getLogger(__name__)
BACKLOG = 2048
# What is open beside the connections: files of soft prompts, sockets of the engine, logs.
SPARE_FILES = 256


class UnfinishedRequests(Exception):
    """The server ended before all requests were finished; the message says why."""


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options, warn=False)
        # For this process, and for the engine and the compressions, which it starts.
        os.environ.update({LEVEL_VARIABLE: settings.log_level, FORMAT_VARIABLE: settings.log_format})
        configure_logging()
        warn_of_unknown_variables()
        listener = _listen(settings)
        # Until it serves: an exception lets the engine and the temporary files go; the default would end the process on
        # the spot.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        import uvloop  # here and below: what takes seconds to import comes behind everything that may be refused

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
    from softbatch.server.services import running_services

    importing = asyncio.create_task(asyncio.to_thread(_import_what_serves))
    async with running_services(settings, importing) as services:
        import uvicorn

        from softbatch.server.app import create_app
        from softbatch.server.draining import DrainingServer
        from softbatch.server.http.connections import ConnectionBounds, Connections
        from softbatch.server.http.inner_request import InnerApp
        from softbatch.server.http.request_log import RequestFields
        from softbatch.server.routes import BATCH_ROUTERS

        services.batches.begin(InnerApp(services, BATCH_ROUTERS).ask)
        _allow_open_files(settings.max_connections + SPARE_FILES)
        for handler in logging.getLogger().handlers:
            handler.addFilter(RequestFields())
        connections = Connections(ConnectionBounds.of(settings), services.metrics)
        config = uvicorn.Config(
            create_app(services),
            http=connections.protocol(),
            ws="none",
            lifespan="off",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_timeout,
        )
        _say_what_next(services.model_name, settings, listener.getsockname()[1])
        server = DrainingServer(config, services)
        services.engine.on_give_up = server.give_up
        if services.supervisor.gave_up:  # before anybody listened to it
            raise UnfinishedRequests("the engine could not be kept alive; see the log above")
        sweeping = asyncio.create_task(connections.keep_sweeping())
        try:
            await server.serve(sockets=[listener])
        finally:
            sweeping.cancel()
        if services.supervisor.gave_up:
            raise UnfinishedRequests("the engine could not be kept alive; see the log above")
        if server.was_cut_short:
            raise UnfinishedRequests("ended before all requests were finished")


def _say_what_next(model: str, settings: Settings, port: int) -> None:
    """Where the server is, and a first request to copy."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    key = ' -H "Authorization: Bearer $SOFTBATCH_API_KEY"' if settings.api_key else ""
    body = '{"messages": [{"role": "user", "content": "Who are you?"}]}'
    logger.info("serving %s on http://%s:%d", model, host, port)
    logger.info(
        "try: curl http://%s:%d/v1/chat/completions -H 'Content-Type: application/json'%s -d '%s'",
        host,
        port,
        key,
        body,
    )
    other = "" if (host, port) == ("127.0.0.1", 8000) else f" --server http://{host}:{port}"
    logger.info("or:  softbatch chat%s", other)
    if not settings.no_console:
        logger.info("or:  http://%s:%d/console in a browser", host, port)


def _import_what_serves() -> None:
    """Takes seconds, which the engine needs too until it has loaded its model. Only an adapter that is uploaded brings
    torch into this process."""
    with importing_for_good("transformers"):
        with _tokenizers_without_models():
            import transformers

            # Imported when they are asked for; a config, whichever, brings what reading a tokenizer needs beside it.
            _ = transformers.AutoTokenizer, transformers.LlamaConfig
        import uvicorn  # noqa: F401

        import softbatch.server.app
        import softbatch.server.draining
        import softbatch.server.http.connections
        import softbatch.server.http.inner_request  # noqa: F401


@contextlib.contextmanager
def _tokenizers_without_models() -> Iterator[None]:
    """Imported in here, transformers leaves out what its models need: this process has tokenizers and no model.

    It looks once for torch and imports half of it and of itself if that is there. Nothing else of this process may
    import torch meanwhile: what runs beside it waits for the engine."""
    if "torch" in sys.modules:  # as in a test
        yield
        return
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    sys.modules["torch"] = None  # type: ignore[assignment]  # to importlib: there is no such module
    os.environ[quiet] = "1"
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[quiet]


def _allow_open_files(count: int) -> None:
    """A connection is an open file, of which many systems allow 1024 unless a process asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < count:
        logger.warning("this system allows %d open files, too few for --max-connections", allowed)


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
