"""A request in the words of OpenTelemetry's semantic conventions for generative AI: attributes and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.metrics import Histogram, Meter

from softbatch.server.observability.request_record import RequestRecord, Started

PROVIDER = "softbatch"
Value = str | bool | int | float | Sequence[str]

_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_EACH = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(4.0**power for power in range(14))


@dataclass(frozen=True)
class Operation:
    """What a route does, and what the ids of its replies begin with."""

    name: str
    id_prefix: str = ""


# By route; POST alone.
OPERATIONS: Mapping[str, Operation] = {
    "/v1/chat/completions": Operation("chat", "chatcmpl-"),
    "/v1/messages": Operation("chat", "msg_"),
    "/v1/responses": Operation("chat", "resp_"),
    "/v1/completions": Operation("text_completion", "cmpl-"),
    "/generate": Operation("text_completion"),
    "/generate_stream": Operation("text_completion"),
    "/invocations": Operation("text_completion"),
    "/": Operation("text_completion"),
    "/v1/embeddings": Operation("embeddings"),
    "/v1/score": Operation("score"),
}


def request_attributes(record: RequestRecord, operation: Operation, model_name: str) -> dict[str, Value]:
    """All of a request that the conventions have a name for, but no text."""
    found: dict[str, Value] = {
        "gen_ai.operation.name": operation.name,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.system": PROVIDER,  # the name's older word, which many backends still look for
    }
    if record.model is not None:
        found["gen_ai.request.model"] = record.model
    if record.is_streamed:
        found["gen_ai.request.stream"] = True
    if not record.started:
        return found
    first = record.started[0]
    found["gen_ai.response.model"] = model_name
    if operation.id_prefix:
        found["gen_ai.response.id"] = operation.id_prefix + first.request_id
    found["gen_ai.usage.input_tokens"] = record.prompt_tokens
    # Of each prompt as its first choice found it; later ones find what that has computed.
    prompts = {id(active.token_ids): active for active in reversed(record.started)}
    if cached := sum(active.virtual_tokens + active.num_cached for active in prompts.values()):
        found["gen_ai.usage.cache_read.input_tokens"] = cached
    if len(record.started) > len(prompts):
        found["gen_ai.request.choice.count"] = len(record.started) // len(prompts)
    if operation.name not in ("embeddings", "score"):
        found |= _of_output(record)
    return found | _of_soft_prompt(first)


def _of_output(record: RequestRecord) -> dict[str, Value]:
    first = record.started[0]
    params = first.params
    found: dict[str, Value] = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.response.finish_reasons": [finish_reason(active) for active in record.started],
    }
    if params.top_k:
        found["gen_ai.request.top_k"] = params.top_k
    if params.frequency_penalty:
        found["gen_ai.request.frequency_penalty"] = params.frequency_penalty
    if params.presence_penalty:
        found["gen_ai.request.presence_penalty"] = params.presence_penalty
    if record.is_streamed and first.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = first.first_token - first.arrived
    return found


def _of_soft_prompt(active: Started) -> dict[str, Value]:
    if active.soft_prompt is None:
        return {}
    return {
        "softbatch.soft_prompt.name": active.soft_prompt,
        "softbatch.soft_prompt.virtual_tokens": active.virtual_tokens,
        "softbatch.soft_prompt.context_tokens": active.context_tokens,
    }


def finish_reason(active: Started) -> str:
    """Why a sequence ended, "stop" for either kind of stop as in OpenAI's API."""
    reason = active.end_reason or "cancelled"
    return "stop" if reason == "eos" else reason


class GenAiMetrics:
    """The conventions' histograms of a server, and of tokens, for which there is only a client's name."""

    def __init__(self, meter: Meter) -> None:
        self._duration = _histogram(meter, "server.request.duration", "s", "From arrival to the last byte.", _SECONDS)
        self._first = _histogram(meter, "server.time_to_first_token", "s", "From arrival to the first token.", _FIRST)
        self._each = _histogram(
            meter, "server.time_per_output_token", "s", "Mean time between tokens of a sequence.", _EACH
        )
        self._tokens = _histogram(meter, "client.token.usage", "{token}", "Tokens of requests.", _TOKENS)

    def observe(
        self,
        record: RequestRecord,
        operation: Operation,
        seconds: float,
        shared: Mapping[str, Value],
        error: str | None,
    ) -> None:
        """Of one request; `shared` are attributes that all have. A model's name counts only if there is one of it."""
        labels: dict[str, Value] = {
            **shared,
            "gen_ai.operation.name": operation.name,
            "gen_ai.provider.name": PROVIDER,
        }
        if record.started and record.model is not None:
            labels["gen_ai.request.model"] = record.model
        self._duration.record(seconds, labels if error is None else {**labels, "error.type": error})
        for active in record.started:
            if active.first_token is None or active.last_token is None:
                continue
            self._first.record(active.first_token - active.arrived, labels)
            if active.generated > 1:
                self._each.record((active.last_token - active.first_token) / (active.generated - 1), labels)
        if record.started:
            self._tokens.record(record.prompt_tokens, {**labels, "gen_ai.token.type": "input"})
            if record.completion_tokens:
                self._tokens.record(record.completion_tokens, {**labels, "gen_ai.token.type": "output"})


def _histogram(meter: Meter, name: str, unit: str, description: str, buckets: Sequence[float]) -> Histogram:
    return meter.create_histogram(
        f"gen_ai.{name}", unit=unit, description=description, explicit_bucket_boundaries_advisory=buckets
    )
