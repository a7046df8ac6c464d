"""Times what a schema costs before its first token: `python -m benchmarks.parts.grammars`.

It is checked once in a process of its own, then compiled by the engine. The schemas are those of the tests.
"""

from __future__ import annotations

import json
import statistics
import time

from softbatch.scheduler.model.model_files import load_tokenizer
from softbatch.scheduler.model.sampling.grammar import compile_grammar, grammar_tokenizer
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.server.requests.grammar_checker import check
from tests.support.schemas import SCHEMAS


def main() -> None:
    tokenizer = load_tokenizer(resolve(EMBEDDED_ALIAS).path)
    size = len(tokenizer)
    started = time.perf_counter()
    tokens = grammar_tokenizer(tokenizer.backend_tokenizer, size, [tokenizer.eos_token_id])
    print(f"tokenizer, once: {time.perf_counter() - started:.2f} s")
    checks, compilations = [], []
    for schema in SCHEMAS:
        started = time.perf_counter()
        reply = check(tokens, size, "json_schema", json.dumps(schema))
        checks.append(time.perf_counter() - started)
        assert reply.grammar is not None, reply.reason
        started = time.perf_counter()
        compile_grammar(tokens, reply.grammar, size)
        compilations.append(time.perf_counter() - started)
    for name, times in (("checked", checks), ("compiled", compilations)):
        p50, p99 = 1e3 * statistics.median(times), 1e3 * statistics.quantiles(times, n=100)[98]
        print(f"{len(times)} schemas {name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {1e3 * max(times):.2f} ms")


if __name__ == "__main__":
    main()
