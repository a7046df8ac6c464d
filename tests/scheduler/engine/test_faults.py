"""A fault in one sequence or soft prompt fails that one; what chance decides does not depend on the company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softbatch.prompt_store.soft_prompt_file import save
from softbatch.scheduler.protocol import AddRequest, SamplingParams, SoftPromptRef
from softbatch.scheduler.step import DeviceLost
from tests.support.engines import build, check_empty, drain, make_request, tokens_of
from tests.support.models import load_reference, make_soft_prompt, save_prompt


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, str]) -> str:
    return tiny_models["llama"]


def test_a_poison_request_fails_alone_and_the_others_lose_no_token(llama: str) -> None:
    engine, ready = build(llama, num_blocks=64, max_batch_size=8, max_batch_tokens=64, max_model_len=128)
    reference = load_reference(llama)
    good = [make_request(f"good{i}", [100 + i, 200, 300]) for i in range(3)]
    poison = make_request("poison", [5, ready.model.vocab_size + 3, 7])
    outputs = drain(engine, [good[0], poison, *good[1:]])
    assert [o.finish_reason for o in outputs["poison"]] == ["error"]
    assert "model failed" in outputs["poison"][0].error
    for request in good:
        assert tokens_of(outputs[request.request_id]) == reference.generate(request.token_ids, 10)
    check_empty(engine)


def test_a_gpu_that_refuses_all_further_work_ends_the_engine(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is then started anew: if only the rows failed, every later one would too."""

    def refused(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine, _ = build(llama, num_blocks=64, max_batch_size=8, max_batch_tokens=64, max_model_len=128)
    monkeypatch.setattr(engine._runner, "_on_gpu", True)
    monkeypatch.setattr(engine._runner, "_forward", refused)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert [o.finish_reason for o in drain(engine, [make_request("row", [5])])["row"]] == ["error"]
    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        drain(engine, [make_request("again", [5])])


def test_a_gpu_that_fails_while_a_soft_prompt_is_placed_is_not_told_as_an_unreadable_file(
    llama: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Work on a GPU fails later than it is asked for: the first to notice may be the next soft prompt."""

    def refused(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine, ready = build(llama, num_blocks=64, max_batch_size=8, max_batch_tokens=64, max_model_len=128)
    path = save_prompt(make_soft_prompt("kv", 5, ready.model), tmp_path, "fine")
    monkeypatch.setattr(engine._runner, "_on_gpu", True)
    monkeypatch.setattr(engine._runner._kv_cache, "write", refused)

    def behind(name: str) -> AddRequest:
        ref = SoftPromptRef(name.ljust(64, "0"), str(path), 5)
        return AddRequest(request_id=name, token_ids=[5], params=SamplingParams(max_tokens=3), soft_prompt=ref)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert [o.finish_reason for o in drain(engine, [behind("a")])["a"]] == ["error"]
    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        drain(engine, [behind("b")])


def test_a_soft_prompt_that_cannot_be_read_fails_those_who_need_it_only(llama: str, tmp_path: Path) -> None:
    engine, ready = build(llama, num_blocks=64, max_batch_size=8, max_batch_tokens=64, max_model_len=128)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a soft prompt")
    other = make_soft_prompt("kv", 5, ready.model)
    wrong = make_soft_prompt("embeddings", 5, ready.model)
    stranger = other.manifest.model.model_copy(update={"fingerprint": "0" * 64})
    foreign = tmp_path / "foreign.safetensors"
    save(
        type(other)(other.manifest.model_copy(update={"model": stranger}), keys=other.keys, values=other.values),
        foreign,
    )
    fine = tmp_path / "fine.safetensors"
    save(wrong, fine)
    requests = []
    for name, path in {"broken": broken, "missing": tmp_path / "none", "foreign": foreign, "fine": fine}.items():
        ref = SoftPromptRef(name.ljust(64, "0"), str(path), 5)
        requests.append(
            AddRequest(request_id=name, token_ids=[5, 6], params=SamplingParams(max_tokens=3), soft_prompt=ref)
        )
    outputs = drain(engine, [*requests, make_request("plain", [5, 6])])
    assert {name: out[-1].finish_reason for name, out in outputs.items()} == {
        "broken": "error",
        "missing": "error",
        "foreign": "error",
        "fine": "length",
        "plain": "length",
    }
    assert "model" in outputs["foreign"][0].error
    assert str(tmp_path) not in "".join(o.error or "" for out in outputs.values() for o in out)
    check_empty(engine)


def test_the_same_seed_gives_the_same_text_whatever_else_runs(llama: str) -> None:
    params = {"temperature": 1.0, "seed": 1234, "max_tokens": 20, "top_p": 0.95}
    mine = make_request("mine", [10, 20, 30], **params)

    def run(batch_tokens: int, num_blocks: int, company: int) -> list[int]:
        engine, _ = build(
            llama, num_blocks=num_blocks, max_batch_size=6, max_batch_tokens=batch_tokens, max_model_len=100
        )
        others = [
            make_request(f"o{i}", [40 + i] * (i + 5), temperature=1.0, seed=i, max_tokens=30) for i in range(company)
        ]
        return tokens_of(drain(engine, [*others, mine])["mine"])

    alone = run(64, 64, 0)
    assert len(set(alone)) > 5
    assert run(7, 64, 3) == alone
    assert run(64, 9, 5) == alone


def test_logits_that_are_not_finite_fail_the_sequence(llama: str) -> None:
    engine, _ = build(llama, num_blocks=64, max_batch_size=4, max_batch_tokens=32, max_model_len=64)
    embed = engine._runner._forward._embed
    with torch.no_grad():
        embed.weight[77] = float("nan")
    outputs = drain(engine, [make_request("nan", [77, 5]), make_request("good", [6, 7])])
    assert outputs["nan"][-1].finish_reason == "error"
    assert "finite" in outputs["nan"][-1].error
    assert len(tokens_of(outputs["good"])) == 10
