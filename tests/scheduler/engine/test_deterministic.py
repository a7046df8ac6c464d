"""With `deterministic`, what a request gets is the same bit for bit alone and in any crowd."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoConfig

from softbatch.scheduler.engine.engine import Engine, build_engine
from softbatch.scheduler.model.source import ModelError
from softbatch.scheduler.protocol import AddRequest, EngineConfig, ModelInfo, SamplingParams, SoftPromptRef
from tests.support.engines import drain
from tests.support.models import make_soft_prompt, save_prompt

BLOCKS = 100
OTHERS = 63


@dataclass
class Served:
    engine: Engine
    refs: list[SoftPromptRef]
    _names: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def alone(self, request: AddRequest) -> Any:
        """Nothing that was cached before is reused."""
        return self.together([msgspec.structs.replace(request, cache_salt=f"alone-{next(self._names)}")])[0]

    def together(self, requests: list[AddRequest]) -> list[Any]:
        """Of each: its tokens, their log-probabilities, and the scores of its prompt."""
        named = [msgspec.structs.replace(request, request_id=str(next(self._names))) for request in requests]
        found = drain(self.engine, named)
        assert not any(output.error for outputs in found.values() for output in outputs)
        return [
            [(output.token_ids, output.logprobs, output.scores) for output in found[one.request_id] if output.token_ids]
            for one in named
        ]


def serve(path: str, dtype: str, where: Path, **options: Any) -> Served:
    values = {"deterministic": True, "max_batch_size": 64, "max_batch_tokens": 128, "max_model_len": 512} | options
    config = AutoConfig.from_pretrained(path)
    width = config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    size = 4 if dtype == "float32" else 2
    gib = (BLOCKS + 0.5) * 2 * width * 16 * size / 2**30
    engine, ready = build_engine(EngineConfig(model=path, dtype=dtype, device="cpu", kv_cache_gib=gib, **values), print)
    return Served(engine, soft_prompts(ready.model, where))


def soft_prompts(info: ModelInfo, where: Path) -> list[SoftPromptRef]:
    refs = []
    for number, (kind, length) in enumerate((("embeddings", 129), ("kv", 20))):
        path = save_prompt(make_soft_prompt(kind, length, info, scale=0.5), where, kind)
        refs.append(SoftPromptRef(str(number) * 64, str(path), length))
    return refs


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def served(
    request: pytest.FixtureRequest, tiny_compressible: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    served = serve(tiny_compressible, request.param, tmp_path_factory.mktemp("prompts"))
    yield served
    served.engine.close()


def ask(token_ids: list[int], params: SamplingParams, **values: Any) -> AddRequest:
    return AddRequest(request_id="", token_ids=token_ids, params=params, **values)


def crowd(rng: random.Random, refs: list[SoftPromptRef], count: int) -> list[AddRequest]:
    """Greedy and seeded, short and long, with soft prompts, scores and penalties; many begin with the same 270 tokens,
    enough for attention to compute them once for all."""
    common = [rng.randrange(100, 4000) for _ in range(270)]
    made = []
    for index in range(count):
        ids = [rng.randrange(100, 4000) for _ in range(rng.choice([1, 2, 17, 33, 64, 129]))]
        ids = common + ids[:17] if index % 3 == 0 else ids
        params = SamplingParams(
            max_tokens=rng.choice([4, 12, 30]),
            temperature=rng.choice([0.0, 0.9]),
            top_p=rng.choice([1.0, 0.9]),
            seed=index,
            ignore_eos=True,
            logprobs=rng.choice([0, 1, 5]),
            frequency_penalty=rng.choice([0.0, 0.5]),
        )
        ref = rng.choice([*refs, None, None]) if len(ids) < 150 else None
        scored = 1 if index % 7 == 1 and len(ids) > 1 else None
        made.append(ask(ids, params, soft_prompt=ref, score_from=scored, score_top=2 if scored else 0))
    return made


def test_each_of_a_crowd_gets_what_it_gets_alone(served: Served) -> None:
    requests = crowd(random.Random(5), served.refs, OTHERS + 1)
    before = served.engine.scheduler.stats(1)
    found = served.together(requests)
    after = served.engine.scheduler.stats(1)
    assert after.prefix_cache_hits_total > before.prefix_cache_hits_total
    for index, request in list(enumerate(requests))[::2]:
        assert found[index] == served.alone(request), f"request {index}"


def test_who_is_preempted_goes_on_with_the_same(served: Served) -> None:
    requests = []
    for index in range(24):
        params = SamplingParams(max_tokens=90, temperature=index % 2, seed=index, ignore_eos=True, logprobs=1)
        requests.append(ask([17 * index + n + 100 for n in range(20)], params))
    before = served.engine.scheduler.stats(1).preemptions_total
    found = served.together(requests)
    assert served.engine.scheduler.stats(1).preemptions_total >= before + 4
    for index in range(20, 24):  # the last are preempted first
        assert found[index] == served.alone(requests[index]), f"request {index}"


@pytest.mark.parametrize("length", [17, 129, 81])
def test_what_the_prefix_cache_has_changes_nothing(served: Served, length: int) -> None:
    """Of 17 tokens it has all but the last; 129 are a step's budget and one more."""
    ids = [7 * n % 3900 + 100 for n in range(length)]
    request = ask(ids, SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, logprobs=3))
    expected = served.alone(request)
    assert [served.together([request])[0] for _ in range(2)] == [expected, expected]


def test_what_was_generated_before_is_not_taken_for_a_prompt(served: Served) -> None:
    """The next turn of a conversation computes its last answer anew, as a server that never saw it does."""
    ids = [11 * n % 3900 + 100 for n in range(20)]
    params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, logprobs=3)
    answer = [token for tokens, *_ in served.together([ask(ids, params)])[0] for token in tokens]
    turn = ask([*ids, *answer, 5, 6, 7], params)
    assert served.together([turn])[0] == served.alone(turn)


@pytest.mark.parametrize("delivered", [1, 7, 20])
def test_another_engine_goes_on_with_the_same(served: Served, delivered: int) -> None:
    ids = [13 * n % 3900 + 100 for n in range(33)]
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True, logprobs=2)
    expected = served.alone(ask(ids, params))
    known = [token for tokens, *_ in expected[:delivered] for token in tokens]
    resumed = served.alone(ask([*ids, *known], params, num_delivered=delivered))
    assert resumed == expected[delivered:]


def test_a_model_that_runs_in_other_code_is_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Sums in torch's own products are rounded as the number of rows has it."""
    config = EngineConfig(model=tiny_models["gpt2"], device="cpu", kv_cache_gib=0.01, deterministic=True)
    with pytest.raises(ModelError, match=r"--deterministic takes a CPU.*GPT2LMHeadModel"):
        build_engine(config, print)
