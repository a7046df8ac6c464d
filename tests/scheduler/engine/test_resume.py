"""A request that another engine has begun goes on as if it had never been interrupted, to the last bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from softbatch.scheduler.protocol import AddRequest, SamplingParams, SequenceOutput, SoftPromptRef
from tests.support.engines import build, drain, tokens_of
from tests.support.models import make_soft_prompt, save_prompt

PROMPT = [101, 200, 300, 400, 17]
TOKENS = 40


def logprobs_of(outputs: list[SequenceOutput]) -> list[object]:
    return [entry for output in outputs for entry in output.logprobs or []]


@pytest.mark.parametrize("kind", [None, "kv", "embeddings"])
def test_tokens_and_logprobs_behind_delivered_ones_are_the_same(
    kind: str | None, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    engine, ready = build(tiny_models["llama"], num_blocks=64, max_batch_size=4, max_batch_tokens=64, max_model_len=128)
    ref = None
    if kind is not None:
        path = save_prompt(make_soft_prompt(kind, 21, ready.model, scale=0.5), tmp_path, kind)
        ref = SoftPromptRef(kind.ljust(64, "0"), str(path), 21)
    params = SamplingParams(
        max_tokens=TOKENS,
        temperature=0.9,
        top_p=0.95,
        seed=5,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logprobs=2,
        ignore_eos=True,
        logit_bias={7: 2.0, 11: -2.0},
        allowed_token_ids=tuple(range(60)),
        # Behind each token another is barred, and a third behind some two.
        bad_words=(*((first, first * 7 % 60) for first in range(60)), (7, 7, 3)),
    )

    def answer(delivered: list[int]) -> list[SequenceOutput]:
        name = f"r{len(delivered)}"
        request = AddRequest(
            request_id=name,
            token_ids=PROMPT + delivered,
            num_delivered=len(delivered),
            params=params,
            soft_prompt=ref,
            cache_salt=name,  # nothing of another's keys and values
        )
        return drain(engine, [request])[name]

    whole = answer([])
    tokens, logprobs = tokens_of(whole), logprobs_of(whole)
    assert len(tokens) == TOKENS
    assert all(second != first * 7 % 60 for first, second in pairwise(tokens))
    for count in (1, 6, 23, TOKENS - 1):
        rest = answer(tokens[:count])
        assert tokens_of(rest) == tokens[count:]
        assert logprobs_of(rest) == logprobs[count:]
        assert rest[-1].finish_reason == "length"
