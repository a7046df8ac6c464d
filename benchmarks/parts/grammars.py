"""Times what a schema costs, before its first token and at each: `python -m benchmarks.parts.grammars`.

It is checked once in a process of its own, then compiled by the engine. These schemas are those of the tests. Behind
every step greedy rows are sampled, of which a share would choose a token that is not the text's next: the processor's
time tells what that takes, also on a machine with other work.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher

from benchmarks.serving.structured import SCHEMA
from softbatch.scheduler.model.model_files import load_tokenizer
from softbatch.scheduler.model.sampling.adjustments import SampleInput
from softbatch.scheduler.model.sampling.constraints import Constraint, Constraints
from softbatch.scheduler.model.sampling.grammar import GrammarMasks, compile_grammar, grammar_tokenizer
from softbatch.scheduler.model.sampling.sampler import own_choice, sample
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.scheduler.protocol import AddRequest, SamplingParams
from softbatch.scheduler.sequence import Sequence
from softbatch.server.requests.grammar_checker import check
from softbatch.server.requests.output_format import JSON_WHITESPACE
from tests.support.schemas import SCHEMAS

ROWS, STEPS = 32, 120
PLACES = [("Port of London", "harbour"), ("New York", "station"), ("Hamburg", "airport"), ("Oslo", "harbour")]


class Texts:
    """Sequences that write JSON of the schema, a token a step, and the logits that would make them."""

    def __init__(self, tokenizer: Any, grammar: str) -> None:
        places = [{"name": name, "kind": kind, "opened": 1900, "tags": ["sea", "old"]} for name, kind in PLACES]
        encode = tokenizer.backend_tokenizer.encode
        self._tokens = [encode(json.dumps(places, indent=row % 4 or None)).ids for row in range(ROWS)]
        params = SamplingParams(temperature=0.0, grammar=grammar, max_tokens=STEPS + 1)
        self.sequences = [
            Sequence(AddRequest(request_id=f"{row}", token_ids=[1], params=params), 0) for row in range(ROWS)
        ]
        self._random = np.random.default_rng(1)
        self._noise = torch.from_numpy(self._random.standard_normal((ROWS, len(tokenizer)), dtype=np.float32))

    def logits(self, share: float) -> torch.Tensor:
        """With that share of rows another token is above the next one."""
        logits = self._noise.clone()
        for row, (sequence, tokens) in enumerate(zip(self.sequences, self._tokens, strict=True)):
            if self._random.random() < share:
                logits[row, self._random.integers(logits.shape[1])] = 9.0
            logits[row, tokens[sequence.num_generated]] = 8.0
        return logits

    def go_on(self) -> None:
        for sequence, tokens in zip(self.sequences, self._tokens, strict=True):
            sequence.tokens.append(tokens[sequence.num_generated])


def step_seconds(constraints: Constraints, texts: Texts, share: float) -> float:
    """The processor's, of one step."""
    spent = 0.0
    for _ in range(STEPS):
        logits = texts.logits(share)
        started = time.process_time()
        choices = {
            one.request_id: token
            for row, one in enumerate(texts.sequences)
            if one.params.grammar and (token := own_choice(logits[row], one.params)) is not None
        }
        found = constraints.of(texts.sequences, logits.shape[1], choices)
        inputs = []
        for one in texts.sequences:
            constraint = found.get(one.request_id, Constraint())
            assert isinstance(constraint, Constraint), constraint
            inputs.append(SampleInput(one.params, one.tokens, 1, one.length, None, constraint.barred, constraint.mask))
        sample(logits, inputs).read()
        spent += time.process_time() - started
        texts.go_on()
    return spent / STEPS


def time_steps(tokenizer: Any) -> None:
    torch.set_num_threads(1)
    size, end = len(tokenizer), [tokenizer.eos_token_id]
    constraints = Constraints(GrammarMasks(lambda: grammar_tokenizer(tokenizer.backend_tokenizer, size, end), size))
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_pattern": JSON_WHITESPACE})
    step_seconds(constraints, Texts(tokenizer, grammar), 0.5)
    for share in (0.0, 0.25, 0.5, 1.0):
        milliseconds = 1e3 * step_seconds(constraints, Texts(tokenizer, grammar), share)
        print(f"{ROWS} greedy rows with a schema, {share:.0%} with another choice: {milliseconds:.2f} ms a step")
    print(f"{ROWS} greedy rows without: {1e3 * step_seconds(constraints, Texts(tokenizer, ''), 0.0):.2f} ms a step")


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
    time_steps(tokenizer)


if __name__ == "__main__":
    main()
