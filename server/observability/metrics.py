"""Prometheus metrics, filled from what the engine reports after each step; scraping never touches the step loop."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from softbatch.scheduler.protocol import EngineStats, Ready, StepOutput

_QUEUE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
_BETWEEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """Owns one registry, so that two servers in one process do not share figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        self._make_batch_metrics()
        self._make_request_metrics()
        self._make_soft_prompt_metrics()
        self._totals = {
            "preemptions_total": self.preemptions,
            "out_of_memory_total": self.out_of_memory,
            "prefix_cache_queries_total": self.prefix_queries,
            "prefix_cache_hits_total": self.prefix_hits,
            "soft_prompt_hits_total": self.soft_prompt_hits,
            "soft_prompt_misses_total": self.soft_prompt_misses,
            "soft_prompt_evictions_total": self.soft_prompt_evictions,
        }
        self._seen = dict.fromkeys(self._totals, 0)
        self._num_blocks = 1

    def _make_batch_metrics(self) -> None:
        """Queue, batch, KV cache and engine."""
        self.requests_waiting = self._gauge("requests_waiting", "Requests in the waiting queue.")
        self.queue_tokens = self._gauge("queue_tokens", "Tokens of the requests in the waiting queue.")
        self.requests_rejected = self._counter("requests_rejected_total", "Requests turned away.", "reason")
        self.queue_time = self._histogram("queue_time_seconds", "From arrival to the first admission.", _QUEUE)

        self.requests_running = self._gauge("requests_running", "Requests in the running batch.")
        self.slots = self._gauge("slots", "The most requests that can run at once.")
        self.batch_size = self._histogram("batch_size", "Requests computed in a step.", _SIZES)
        self.iteration_tokens = self._histogram("iteration_tokens", "Tokens computed in a step.", _SIZES)
        self.step_duration = self._histogram("step_duration_seconds", "Duration of a step.", _STEP)

        self.kv_usage = self._gauge("kv_usage_ratio", "Share of the KV blocks in use, 0 to 1.")
        self.kv_blocks = self._gauge("kv_blocks", "KV blocks there are.")
        self.kv_bytes = self._gauge("kv_cache_bytes", "Memory of all KV blocks.")
        self.preemptions = self._counter("preemptions_total", "Sequences put back to the queue for lack of blocks.")
        self.out_of_memory = self._counter(
            "out_of_memory_total", "Times a step ran out of device memory and was run again, smaller."
        )
        self.prefix_queries = self._counter(
            "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = self._counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")

        self.engine_restarts = self._counter("engine_restarts_total", "Times the engine process was started again.")
        self.engine_pause = self._histogram(
            "engine_pause_seconds", "From an engine's death to its successor's readiness.", _WHOLE
        )
        self.requests_resumed = self._counter(
            "requests_resumed_total", "Requests sent to the engine once more, to go on where they were."
        )
        self.last_step = self._gauge("engine_last_step_timestamp_seconds", "Unix time of the last step or heartbeat.")

    def _make_request_metrics(self) -> None:
        self.requests_finished = self._counter("requests_finished_total", "Requests that ended.", "reason")
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between two tokens.", _BETWEEN)
        self.whole_request = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token, of requests that got it.", _WHOLE
        )
        self.prompt_tokens = self._counter("prompt_tokens_total", "Text tokens of admitted prompts.")
        self.connections = self._gauge("connections", "Open connections.")
        self.connections_refused = self._counter(
            "connections_refused_total", "Connections ended before their request was there.", "reason"
        )
        self.generation_tokens = self._counter("generation_tokens_total", "Tokens generated.")
        self.batches_unfinished = self._gauge("batches_unfinished", "Batches that have not ended.")
        self.batch_lines_left = self._gauge("batch_lines_left", "Lines of theirs that have no answer yet.")
        self.batch_lines = self._counter("batch_lines_total", "Lines of batches answered.", "outcome")

    def _make_soft_prompt_metrics(self) -> None:
        self.soft_prompts_registered = self._gauge("soft_prompts_registered", "Soft prompts in the store.")
        self.soft_prompts_resident = self._gauge("soft_prompts_resident", "Soft prompts in KV blocks.")
        self.soft_prompts_resident_bytes = self._gauge("soft_prompts_resident_bytes", "Bytes of their KV blocks.")
        self.soft_prompt_hits = self._counter(
            "soft_prompt_cache_hits_total", "Requests whose soft prompt was resident."
        )
        self.soft_prompt_misses = self._counter(
            "soft_prompt_cache_misses_total", "Requests for which one had to be read."
        )
        self.soft_prompt_evictions = self._counter("soft_prompt_cache_evictions_total", "Soft prompts evicted.")
        self.soft_prompt_load = self._histogram("soft_prompt_load_seconds", "From need to resident.", _STEP)
        self.virtual_tokens = self._counter("virtual_tokens_total", "Virtual tokens of admitted requests.")
        self.context_tokens_saved = self._counter(
            "context_tokens_saved_total",
            "Context tokens that soft prompts stood for, less their virtual tokens.",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"softbatch_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"softbatch_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"softbatch_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, *, waiting: Callable[[], int], running: Callable[[], int], registered: Callable[[], float]) -> None:
        """Read these levels at the moment of the scrape."""
        self.requests_waiting.set_function(waiting)
        self.requests_running.set_function(running)
        self.soft_prompts_registered.set_function(registered)

    def engine_started(self, ready: Ready, slots: int) -> None:
        """A new engine counts from zero."""
        self._num_blocks = ready.num_blocks
        self._seen = dict.fromkeys(self._totals, 0)
        self.kv_blocks.set(ready.num_blocks)
        self.kv_bytes.set(ready.kv_bytes)
        self.slots.set(slots)

    def observe_step(self, output: StepOutput) -> None:
        self.last_step.set(time.time())
        if output.batch_size or output.num_tokens:
            self.batch_size.observe(output.batch_size)
            self.iteration_tokens.observe(output.num_tokens)
            self.step_duration.observe(output.step_seconds)
        for seconds in output.soft_prompt_load_seconds:
            self.soft_prompt_load.observe(seconds)
        self._observe_stats(output.stats)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)

    def _observe_stats(self, stats: EngineStats) -> None:
        self.queue_tokens.set(stats.waiting_tokens)
        self.kv_usage.set(stats.kv_blocks_used / self._num_blocks)
        self.soft_prompts_resident.set(stats.soft_prompts_resident)
        self.soft_prompts_resident_bytes.set(stats.soft_prompt_resident_bytes)
        for name, metric in self._totals.items():
            value: int = getattr(stats, name)
            if value != self._seen[name]:
                metric.inc(value - self._seen[name])
                self._seen[name] = value
