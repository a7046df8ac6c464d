"""The queue of compressions that goes with a prompt store, and what both kinds of it do."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry

from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.prompt_store.stores.store import SoftPromptStore
from softbatch.scheduler.protocol import ModelInfo
from softbatch.server.compressions.job_queue import CompressionJobs
from softbatch.server.compressions.record import Job
from softbatch.server.compressions.request import CompressionRequest, ModelChoice


def served_choice(model: ModelInfo) -> ModelChoice:
    """Of the model that this server runs, as this machine has it."""
    return ModelChoice(model.tokenizer_path, model.name, model.dtype, model.device)


class CompressionQueue(Protocol):
    """Raises failures of `request_failures`."""

    def list(self) -> Sequence[Job]: ...

    def get(self, job_id: str) -> Job: ...

    def check_place(self, name: str) -> None: ...

    async def create(self, request: CompressionRequest) -> Job: ...

    async def cancel(self, job: Job) -> None: ...

    def watch(self, job: Job) -> AsyncGenerator[Job, None]: ...

    async def report(self, job: Job) -> Path | None:
        """The page, where there is one."""
        ...


def running_queue(
    store: SoftPromptStore, model: ModelInfo, registry: CollectorRegistry, is_draining: Callable[[], bool]
) -> AbstractAsyncContextManager[CompressionQueue]:
    """One server of a directory runs its compressions, by a lock there; all servers of a bucket share theirs."""
    if isinstance(store, PromptStore):
        return CompressionJobs(store, model.spec, registry, is_draining).running()
    from softbatch.prompt_store.stores.object_store import ObjectStore
    from softbatch.server.compressions.shared_queue import SharedCompressions

    assert isinstance(store, ObjectStore)
    return SharedCompressions(store, model.spec, registry, is_draining, lambda: served_choice(model)).running()
