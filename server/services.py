"""The parts that routes use, and their life: started together, engine process first, and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softbatch.prompt_store.atomic_files import process_directory
from softbatch.prompt_store.manifest import ModelSpec, SoftPromptError
from softbatch.prompt_store.stores.store import SoftPromptStore
from softbatch.scheduler.model.model_files import load_tokenizer
from softbatch.scheduler.protocol import EngineConfig, Ready
from softbatch.server.batches.batch_queue import BatchLimits, BatchQueue
from softbatch.server.compressions.queues import CompressionQueue, running_queue
from softbatch.server.observability.live_feed import LiveFeed
from softbatch.server.observability.metrics import Metrics
from softbatch.server.observability.otlp_target import otlp_target
from softbatch.server.observability.vllm_names import VllmNames
from softbatch.server.requests.admission import Admission, AdmissionLimits
from softbatch.server.requests.embedding import Embedder
from softbatch.server.requests.engine_client import EngineClient
from softbatch.server.requests.engine_supervisor import EngineSupervisor, Patience, StartupError
from softbatch.server.requests.generation import Generator
from softbatch.server.requests.leases import SoftPromptLeases, lease_directory
from softbatch.server.requests.output_format import GrammarCompiler
from softbatch.server.requests.prompt_encoder import PromptEncoder
from softbatch.server.requests.recall import PassageIndexes, Recaller
from softbatch.server.requests.scoring import Scorer
from softbatch.server.requests.text import TextProcessor
from softbatch.server.settings import Settings, absolute_model, absolute_path
from softbatch.server.store_of_settings import store_of
from softbatch.server.tools.dialect import Dialect

if TYPE_CHECKING:
    from softbatch.server.observability.tracing import Tracing

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 5.0  # of the collector's connection


@dataclass(frozen=True)
class Services:
    """The parts that routes use, made once at start."""

    settings: Settings
    supervisor: EngineSupervisor
    engine: EngineClient
    admission: Admission
    generator: Generator
    recaller: Recaller
    scorer: Scorer
    embedder: Embedder
    store: SoftPromptStore
    leases: SoftPromptLeases
    compressions: CompressionQueue
    batches: BatchQueue
    text: TextProcessor
    dialect: Dialect
    metrics: Metrics
    live: LiveFeed
    tracing: Tracing | None
    temporary: Path
    spec: ModelSpec
    model_name: str


@contextlib.asynccontextmanager
async def running_services(settings: Settings, imports: Awaitable[None] | None = None) -> AsyncIterator[Services]:
    """Start everything, engine process first, and stop it again at the end. `imports`, if somebody imports transformers
    meanwhile, are waited for before the tokenizer is read. Raises StartupError."""
    tracing = _tracing(settings)
    try:
        async with _running(settings, tracing, imports) as services:
            yield services
    finally:
        if tracing is not None:
            await asyncio.to_thread(tracing.close, CLOSE_SECONDS)


@contextlib.asynccontextmanager
async def _running(
    settings: Settings, tracing: Tracing | None, imports: Awaitable[None] | None
) -> AsyncIterator[Services]:
    started = time.monotonic()
    store = _prompt_store(settings)
    metrics = Metrics()
    with _leases(store.root) as leased:
        async with _running_engine(settings, metrics) as (temporary, supervisor, engine, ready):
            model = ready.model
            if tracing is not None:
                tracing.describe(model.name, lambda: supervisor.pid)
            if imports is not None:  # who imports what another thread still does gets transformers without its names
                await imports
            text = await asyncio.to_thread(_text_processor, ready)
            encoder = PromptEncoder(text, model.vocab_size, model.max_model_len, settings.default_max_tokens)
            recaller = Recaller(PassageIndexes(store), text, encoder)
            leases = SoftPromptLeases(store, model.spec, leased, engine.forget_soft_prompt)
            admission = _admission(settings, engine, leases, metrics)
            _watch(metrics, engine, store)
            if settings.vllm_metric_names:
                metrics.registry.register(VllmNames(metrics, model.name))
            checking = asyncio.create_task(asyncio.to_thread(_warn_of_broken, store))
            logger.info("ready after %.2f s", time.monotonic() - started)
            jobs = running_queue(store, model, metrics.registry, lambda: admission.draining)
            feed = LiveFeed(metrics, lambda: admission.draining)
            queue = _batch_queue(settings, metrics, admission)
            eos = model.eos_token_ids
            with contextlib.closing(GrammarCompiler(text.backend, model.vocab_size, eos)) as grammars:
                async with jobs as compressions, queue.running() as batches, feed.running() as live:
                    yield Services(
                        settings=settings,
                        supervisor=supervisor,
                        engine=engine,
                        admission=admission,
                        generator=Generator(admission, text, encoder, recaller, grammars, settings.seed, eos),
                        recaller=recaller,
                        scorer=Scorer(admission, encoder, recaller, eos),
                        embedder=Embedder(admission, encoder, settings.max_batch_size),
                        store=store,
                        leases=leases,
                        compressions=compressions,
                        batches=batches,
                        text=text,
                        dialect=Dialect(text, settings.tool_call_parser, settings.reasoning_parser),
                        metrics=metrics,
                        live=live,
                        tracing=tracing,
                        temporary=temporary,
                        spec=model.spec,
                        model_name=model.name,
                    )
                await checking


@contextlib.asynccontextmanager
async def _running_engine(
    settings: Settings, metrics: Metrics
) -> AsyncIterator[tuple[Path, EngineSupervisor, EngineClient, Ready]]:
    """And the directory for temporary files, which the engine's sockets are in."""
    # Their paths are short, for ipc:// allows about 100 characters.
    with process_directory(Path(tempfile.gettempdir()), "softbatch-serve-") as temporary:
        patience = Patience(settings.step_timeout, settings.max_engine_deaths, settings.engine_death_window)
        supervisor = EngineSupervisor(_engine_config(settings), temporary, patience)
        engine = EngineClient(supervisor, metrics)
        try:
            yield temporary, supervisor, engine, await supervisor.start(engine)
        finally:
            await supervisor.stop()
            engine.fail_all("the server is shutting down")


def _prompt_store(settings: Settings) -> SoftPromptStore:
    """Raises StartupError."""
    try:
        store = store_of(settings)
        store.sweep()
    except SoftPromptError as error:
        raise StartupError(f"--prompt-store {error}") from error
    except OSError as error:
        raise StartupError(f"--prompt-store {settings.prompt_store}: {error.strerror or error}") from error
    return store


def _tracing(settings: Settings) -> Tracing | None:
    """Imports OpenTelemetry, unless tracing is off. Raises StartupError."""
    try:
        target = otlp_target(settings.otlp_endpoint, os.environ)
    except ValueError as error:
        raise StartupError(str(error)) from error
    if target is None:
        return None
    try:
        from softbatch.server.observability.tracing import Tracing
    except ImportError as error:
        what = f"traces and metrics need packages that are missing ({error.name}): pip install 'softbatch[otel]'"
        if target.is_flag:
            raise StartupError(f"--otlp-endpoint: {what}") from error
        logger.warning("OTEL_EXPORTER_OTLP_ENDPOINT: %s", what)
        return None
    return Tracing(target, settings.host, settings.port)


def _text_processor(ready: Ready) -> TextProcessor:
    since = time.monotonic()
    text = TextProcessor(load_tokenizer(ready.model.tokenizer_path), ready.model.max_model_len)
    logger.info("%-16s %6.2f s", "tokenizer", time.monotonic() - since)
    return text


@contextlib.contextmanager
def _leases(root: Path) -> Iterator[Path]:
    """Made before the model is loaded, so that a disk without room is told at once. Raises StartupError."""
    with contextlib.ExitStack() as exits:
        try:
            directory = exits.enter_context(lease_directory(root))
        except OSError as error:
            raise StartupError(f"--prompt-store {root}: {error.strerror}") from error
        yield directory


def _watch(metrics: Metrics, engine: EngineClient, store: SoftPromptStore) -> None:
    """Levels that are looked up whenever they are asked for."""
    metrics.watch(
        waiting=lambda: engine.num_waiting,
        running=lambda: engine.num_running,
        registered=lambda: _count(store),
    )


def _count(store: SoftPromptStore) -> float:
    """Not a number while the disk does not work: the other metrics are needed most then."""
    try:
        return len(store.list())
    except OSError:
        return math.nan


def _warn_of_broken(store: SoftPromptStore) -> None:
    """Reads every soft prompt once, in a thread: with many of them that takes a while."""
    for name, reason in store.broken():
        logger.warning("soft prompt %s cannot be used: %s", name, reason)


def _admission(settings: Settings, engine: EngineClient, leases: SoftPromptLeases, metrics: Metrics) -> Admission:
    limits = AdmissionLimits(
        slots=settings.max_batch_size,
        max_waiting=settings.max_queue_size,
        max_waiting_tokens=settings.max_queue_tokens,
        max_waiting_per_owner=settings.max_queue_size_per_key,
        request_timeout=settings.request_timeout,
        weights=settings.weights_by_owner(),
    )
    return Admission(engine, leases, metrics, limits)


def _batch_queue(settings: Settings, metrics: Metrics, admission: Admission) -> BatchQueue:
    limits = BatchLimits(
        max_lines=settings.max_batch_lines,
        max_file_bytes=settings.max_batch_file_bytes,
        concurrency=settings.batch_concurrency or max(1, settings.max_batch_size // 4),
    )
    root = settings.batch_dir or settings.store_root / ".batches"
    return BatchQueue(root, limits, metrics, lambda: admission.draining)


def _engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        model=absolute_model(settings.model),
        served_model_name=settings.served_model_name,
        chat_template=absolute_path(settings.chat_template),
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        device=settings.device,
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        step_target=settings.step_target,
        max_model_len=settings.max_model_len,
        max_queue_size=settings.max_queue_size,
        kv_cache_gib=settings.kv_cache_gib,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        block_size=settings.block_size,
        async_scheduling=settings.async_scheduling,
        deterministic=settings.deterministic,
        max_prompt_bytes=settings.max_prompt_mib << 20,
    )
