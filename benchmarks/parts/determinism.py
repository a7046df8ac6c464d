"""What --deterministic costs, and whether it keeps its word on a real model: `python -m benchmarks.parts.determinism`.

Two engines of one process, one with the option, decode the same requests in turn, so that both see the same machine.
Then each of 64 requests of many kinds is asked among the others and alone, and its tokens and log-probabilities are
compared bit for bit, with the option and without.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from softbatch.scheduler.engine.engine import Engine, build_engine
from softbatch.scheduler.protocol import AddRequest, EngineConfig, SamplingParams

CELLS = ((1, 0), (16, 0), (16, 256), (4, 1024), (16, 1024), (32, 1024), (16, 1536))  # sequences, tokens in common
OWN_TOKENS = 40


def build(options: argparse.Namespace, deterministic: bool) -> Engine:
    config = EngineConfig(
        model=options.model,
        dtype=options.dtype,
        device="cpu",
        kv_cache_gib=options.kv_cache_gib,
        max_batch_size=64,
        max_model_len=2048,
        deterministic=deterministic,
    )
    return build_engine(config, lambda *_: None)[0]


def ask(name: str, ids: list[int], max_tokens: int, **params: Any) -> AddRequest:
    chosen = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    return AddRequest(request_id=name, token_ids=ids, params=chosen)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 40_000) for _ in range(count)]


def step_times(engines: Sequence[Engine], sequences: int, common: int, steps: int) -> list[list[float]]:
    """Seconds of each decode step of each engine."""
    rng = random.Random(common)
    shared = tokens(rng, common)
    prompts = [shared + tokens(rng, OWN_TOKENS) for _ in range(sequences)]
    found: list[list[float]] = []
    for engine in engines:
        for index, ids in enumerate(prompts):
            engine.handle(ask(f"{index}", ids, steps + 200, temperature=0.0))
            while not any(s.num_generated for s in engine.scheduler.running if s.request_id == str(index)):
                engine.step()
        found.append([])
    for _ in range(steps):
        for engine, times in zip(engines, found, strict=True):
            since = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - since)
    for engine in engines:
        for sequence in list(engine.scheduler.running):
            engine.scheduler.cancel(sequence.request_id)
    return found


def answers(engine: Engine, requests: Sequence[AddRequest]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.handle(request)
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.request_id] += [(output.token_ids, output.logprobs)] if output.token_ids else []
    return found


def num_changed(engine: Engine, max_tokens: int) -> tuple[int, int]:
    """Of 64 requests: how many get other log-probabilities than alone, and how many other tokens."""
    rng = random.Random(1)
    shared, requests = tokens(rng, 600), []
    for index in range(64):
        ids = tokens(rng, rng.choice([1, 17, 33, 129, 400]))
        ids = shared + ids[:33] if index % 2 else ids
        seeded: dict[str, Any] = {"temperature": 0.8 * (index % 4 < 2), "seed": index, "logprobs": index % 5}
        requests.append(ask(str(index), ids, max_tokens, **seeded))
    together, other_numbers, other_tokens = answers(engine, requests), 0, 0
    for request in requests:
        alone = msgspec.structs.replace(request, cache_salt=f"alone-{request.request_id}")
        mine, expected = together[request.request_id], answers(engine, [alone])[request.request_id]
        other_numbers += mine != expected
        other_tokens += [token for token, _ in mine] != [token for token, _ in expected]
    return other_numbers, other_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--kv-cache-gib", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=40, help="decode steps of each cell")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer that is compared")
    options = parser.parse_args()

    engines = [build(options, deterministic) for deterministic in (False, True)]
    print(f"{options.model}, {options.dtype}: least ms of a decode step")
    print(f"{'sequences':>10}{'in common':>10}{'without':>9}{'with':>9}{'speed':>8}")
    for sequences, common in CELLS:
        without, kept = (min(times) * 1e3 for times in step_times(engines, sequences, common, options.steps))
        print(f"{sequences:10}{common:10}{without:9.2f}{kept:9.2f}{without / kept:8.3f}", flush=True)
    for name, engine in zip(("without", "with"), engines, strict=True):
        numbers, texts = num_changed(engine, options.tokens)
        print(f"{name} the option, 64 requests at once: {numbers} other log-probabilities, {texts} other texts")


if __name__ == "__main__":
    main()
