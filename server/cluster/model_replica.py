"""A replica: the whole server but its port, inside of a process of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from softbatch.scheduler.engine.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from softbatch.server.app import create_app
from softbatch.server.cluster.first_token_watch import FirstTokenWatch
from softbatch.server.cluster.inner_call import InnerCall
from softbatch.server.cluster.request_kinds import BATCHES, COMPRESSIONS
from softbatch.server.cluster.wire import decode_asked, encode_said
from softbatch.server.compressions.job_queue import CompressionJobs
from softbatch.server.http.inner_request import InnerApp
from softbatch.server.http.request_log import RequestFields
from softbatch.server.request_failures import BatchesUnavailable, CompressionsUnavailable
from softbatch.server.requests.engine_client import EngineClient
from softbatch.server.routes import BATCH_ROUTERS
from softbatch.server.services import Services, running_services
from softbatch.server.settings import Settings


class ModelReplica:
    """Owns its own engine process. That dies and is started again without the replica, as in `softbatch serve`; a
    replica whose engine cannot be kept alive ends with it, and Serve starts another."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        from softbatch.server.cluster.ray_metrics import mirror_metrics  # imports Ray

        # For the engine and the compressions, which are processes of their own.
        os.environ.update({LEVEL_VARIABLE: settings.log_level, FORMAT_VARIABLE: settings.log_format})
        configure_logging()
        for handler in logging.getLogger().handlers:
            handler.addFilter(RequestFields())
        self._exits = contextlib.AsyncExitStack()
        self._services: Services = await self._exits.enter_async_context(running_services(settings))
        self._app = create_app(self._services)
        self._services.batches.begin(InnerApp(self._services, BATCH_ROUTERS).ask)
        self._first_tokens = FirstTokenWatch(self._services.metrics, self._services.engine)
        self._mirroring = asyncio.create_task(mirror_metrics(self._services.metrics.registry))
        end_with_engine(self._services.engine)

    async def answer(self, head: bytes, body: bytes) -> AsyncGenerator[bytes, None]:
        """A request, as `wire` has it, and what is said to it."""
        call = InnerCall(self._app, decode_asked(head), body, self._services.spec.fingerprint)
        async with contextlib.aclosing(call.run()) as all_said:
            async for said in all_said:
                yield encode_said(said)

    def record_routing_stats(self) -> dict[str, Any]:
        """Serve's: what the request router knows of this replica."""
        services = self._services
        held = services.leases.names_of(services.engine.resident)
        with contextlib.suppress(BatchesUnavailable):
            _ = services.batches.ledger
            held.append(BATCHES)
        with contextlib.suppress(CompressionsUnavailable):
            if isinstance(services.compressions, CompressionJobs):
                services.compressions.list()
            held.append(COMPRESSIONS)
        return {"at": time.time(), "held": held, "room": services.engine.room_for_soft_prompts}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's, if it scales: what the policy knows of this replica."""
        return self._first_tokens.take()

    async def stop(self) -> None:
        """Whatever still runs is cut off."""
        self._services.admission.draining = True
        self._mirroring.cancel()
        await self._exits.aclose()

    async def __del__(self) -> None:
        """Serve calls and awaits this at the end of a replica that it has drained, or has not waited for."""
        if "_mirroring" in vars(self):
            await self.stop()


def end_with_engine(engine: EngineClient, end: Callable[[int], None] = os._exit) -> None:
    """End the process when there will be no engine any more, before anybody is told that it has failed: the ingress
    then takes what was asked here to another replica, and Serve sends nothing more. Raises RuntimeError where there is
    none already."""
    engine.on_give_up = lambda: end(1)
    if engine.has_ended:
        raise RuntimeError("the engine cannot be kept alive; the log says why")
