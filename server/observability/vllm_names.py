"""Queue, batch and KV use under the names that vLLM gives them, for routers and autoscalers that know only those.

What reads them: the endpoint picker of the Kubernetes gateway API's inference extension, llm-d, KEDA's examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from softbatch.server.observability.metrics import Metrics


class VllmNames(Collector):
    """Reads our own gauges at the moment of the scrape."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._model_name = model_name
        self._gauges = {
            "vllm:num_requests_waiting": metrics.requests_waiting,
            "vllm:num_requests_running": metrics.requests_running,
            "vllm:kv_cache_usage_perc": metrics.kv_usage,
            "vllm:gpu_cache_usage_perc": metrics.kv_usage,  # until vLLM 0.9
        }

    def collect(self) -> Iterable[Metric]:
        for name, gauge in self._gauges.items():
            (own,) = gauge.collect()
            family = GaugeMetricFamily(name, f"The same as {own.name}.", labels=("model_name",))
            family.add_metric([self._model_name], own.samples[0].value)
            yield family
