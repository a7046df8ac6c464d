"""What schemas cost: the same texts' lengths with and without them, in turn, against a server that runs already.

    python -m benchmarks.serving.structured --url http://127.0.0.1:8000

With a schema each request says how many tokens it has made; without one the same prompt then makes as many.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import httpx

SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 4,
    "maxItems": 12,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["harbour", "station", "airport"]},
            "opened": {"type": "integer", "minimum": 1800, "maximum": 2025},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
        },
        "required": ["name", "kind", "opened", "tags"],
        "additionalProperties": False,
    },
}
PROMPT = "List harbours, stations and airports of place number {} as JSON, with their names and years."


async def tokens_of(http: httpx.AsyncClient, index: int, temperature: float, length: int | None) -> int:
    """The length of one answer: that of its JSON, or, if given, exactly so many tokens of anything."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": PROMPT.format(index)}],
        "temperature": temperature,
        "seed": index,
        "max_tokens": length or 256,
    }
    if length is None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "places", "schema": SCHEMA}}
    else:
        body["ignore_eos"] = True
    reply = await http.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    tokens: int = reply.json()["usage"]["completion_tokens"]
    return tokens


async def measured(http: httpx.AsyncClient, temperature: float, lengths: list[int | None]) -> tuple[float, list[int]]:
    """Tokens per second of all of them at once, and their lengths."""
    started = time.perf_counter()
    made = await asyncio.gather(*(tokens_of(http, at, temperature, length) for at, length in enumerate(lengths)))
    return sum(made) / (time.perf_counter() - started), list(made)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, timeout=600, limits=limits) as http:
        for temperature in (0.0, 1.0):
            await measured(http, temperature, [None] * options.sequences)
            ratios = []
            for _ in range(options.rounds):
                bound, made = await measured(http, temperature, [None] * options.sequences)
                free, _ = await measured(http, temperature, list(made))
                ratios.append(bound / free)
                print(f"temperature {temperature:g}: {bound:.0f} tokens/s with schemas, {free:.0f} without", flush=True)
            print(f"temperature {temperature:g}: ratio {statistics.median(ratios):.3f} (median)", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
