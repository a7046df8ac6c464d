"""Writes dashboards/softbatch.json: run it after changing what is below."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOARD = Path(__file__).parent / "dashboards" / "softbatch.json"
WIDTH = 24
HERE = '{instance=~"$instance"}'
Query = tuple[str, str]  # a PromQL expression, and the legend of its series


def rate(name: str) -> str:
    return f"sum(rate(softbatch_{name}{HERE}[$__rate_interval]))"


def level(name: str) -> str:
    return f"sum(softbatch_{name}{HERE})"


def by(label: str, name: str) -> str:
    """A counter's rate for each value of a label; zero before its first event, when it has no series yet."""
    return f"sum by ({label}) (rate(softbatch_{name}{HERE}[$__rate_interval])) or vector(0)"


def quantiles(name: str) -> list[Query]:
    buckets = f"sum by (le) (rate(softbatch_{name}_bucket{HERE}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {buckets})", f"p{int(q * 100)}") for q in (0.5, 0.95, 0.99)]


def mean(name: str) -> str:
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def hit_ratio(hits: str, all_of_them: str) -> str:
    return f"{rate(hits)} / ({all_of_them})"


_SOFT_PROMPTS_ASKED = f"{rate('soft_prompt_cache_hits_total')} + {rate('soft_prompt_cache_misses_total')}"
# A row's title, and its panels: title, unit, queries; those of the first row show one figure each.
ROWS: list[tuple[str, list[tuple[str, str, list[Query]]]]] = [
    (
        "At a glance",
        [
            ("Running", "none", [(level("requests_running"), "")]),
            ("Slots", "none", [(level("slots"), "")]),
            ("Waiting", "none", [(level("requests_waiting"), "")]),
            ("Tokens/s", "none", [(rate("generation_tokens_total"), "")]),
            ("First token, p95", "s", [quantiles("time_to_first_token_seconds")[1]]),
            ("KV blocks in use", "percentunit", [(f"max(softbatch_kv_usage_ratio{HERE})", "")]),
        ],
    ),
    (
        "What clients feel",
        [
            ("From arrival to the first token", "s", quantiles("time_to_first_token_seconds")),
            ("Between two tokens", "s", quantiles("inter_token_latency_seconds")),
            ("Waiting in the queue", "s", quantiles("queue_time_seconds")),
            ("From arrival to the last token", "s", quantiles("e2e_request_latency_seconds")),
        ],
    ),
    (
        "Load",
        [
            ("Requests that ended", "reqps", [(by("reason", "requests_finished_total"), "{{reason}}")]),
            ("Requests turned away", "reqps", [(by("reason", "requests_rejected_total"), "{{reason}}")]),
            (
                "Requests here",
                "none",
                [(level("requests_running"), "running"), (level("requests_waiting"), "waiting")],
            ),
            (
                "Tokens",
                "none",
                [(rate("generation_tokens_total"), "written"), (rate("prompt_tokens_total"), "prompts")],
            ),
        ],
    ),
    (
        "Steps",
        [
            ("Duration of a step", "s", quantiles("step_duration_seconds")),
            ("Requests in a step, on average", "none", [(mean("batch_size"), "requests")]),
            ("Tokens in a step, on average", "none", [(mean("iteration_tokens"), "tokens")]),
            (
                "KV cache",
                "percentunit",
                [
                    (f"max(softbatch_kv_usage_ratio{HERE})", "blocks in use"),
                    (hit_ratio("prefix_cache_hits_total", rate("prefix_cache_queries_total")), "prompt tokens found"),
                ],
            ),
        ],
    ),
    (
        "Soft prompts",
        [
            (
                "Soft prompts",
                "none",
                [(level("soft_prompts_registered"), "registered"), (level("soft_prompts_resident"), "resident")],
            ),
            (
                "Found resident",
                "percentunit",
                [(hit_ratio("soft_prompt_cache_hits_total", _SOFT_PROMPTS_ASKED), "of requests")],
            ),
            ("From need to resident", "s", quantiles("soft_prompt_load_seconds")),
            (
                "Tokens that nobody had to read",
                "none",
                [
                    (rate("context_tokens_saved_total"), "stood for by soft prompts"),
                    (rate("virtual_tokens_total"), "virtual tokens instead"),
                ],
            ),
        ],
    ),
    (
        "Trouble",
        [
            ("Preemptions", "ops", [(rate("preemptions_total"), "sequences put back")]),
            (
                "Engine",
                "none",
                [
                    (level("engine_restarts_total"), "restarts since the start"),
                    (level("out_of_memory_total"), "steps out of memory"),
                ],
            ),
            (
                "Connections",
                "none",
                [(level("connections"), "open"), (by("reason", "connections_refused_total"), "refused/s {{reason}}")],
            ),
            ("Compression jobs", "none", [(f"sum by (status) (softbatch_compression_jobs{HERE})", "{{status}}")]),
        ],
    ),
]


def panels() -> Iterator[dict[str, Any]]:
    y = 0
    for number, (row, content) in enumerate(ROWS):
        yield {"type": "row", "title": row, "collapsed": False, "gridPos": place(0, y, WIDTH, 1), "panels": []}
        y += 1
        height, width = (4 if number == 0 else 8), WIDTH // len(content)
        for column, (title, unit, queries) in enumerate(content):
            yield panel("stat" if number == 0 else "timeseries", title, unit, queries) | {
                "gridPos": place(column * width, y, width, height)
            }
        y += height


def panel(kind: str, title: str, unit: str, queries: list[Query]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    targets = [
        {"refId": chr(ord("A") + index), "datasource": source, "expr": expression, "legendFormat": legend or "__auto"}
        for index, (expression, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "datasource": source,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
    }


def place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def board() -> dict[str, Any]:
    numbered = [content | {"id": number} for number, content in enumerate(panels(), 1)]
    instances = "label_values(softbatch_slots, instance)"
    return {
        "uid": "softbatch",
        "title": "softbatch",
        "tags": ["softbatch"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "instance",
                    "label": "Server",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${source}"},
                    "query": {"query": instances, "refId": "instances"},
                    "definition": instances,
                    "includeAll": True,
                    "multi": True,
                    "refresh": 2,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": numbered,
    }


def text() -> str:
    return json.dumps(board(), indent=2) + "\n"


if __name__ == "__main__":
    BOARD.write_text(text())
