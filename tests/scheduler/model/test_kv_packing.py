"""The packed KV cache: what is packed, read by the book, is near what was given; attention is attention over that."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.engine.engine import build_engine
from softbatch.scheduler.model import loader
from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.attention.backend import CAUSAL, AttentionBackend, AttentionKind, PagedBatch
from softbatch.scheduler.model.attention.reference import reference
from softbatch.scheduler.model.batch import Row, build_batch
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import KvFormat, WeightFormat
from softbatch.scheduler.model.forward import TransformersForward
from softbatch.scheduler.model.key_offsets import KeyOffsets
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.llama.decoder import DecoderForward, supports
from softbatch.scheduler.model.llama.description import key_offsets_of
from softbatch.scheduler.model.source import ModelError
from softbatch.scheduler.protocol import EngineConfig, SoftPromptRef
from tests.support import decoders
from tests.support.decoders import CPU, closeness, distance, make_model, make_rows
from tests.support.engines import check_empty, request, run
from tests.support.models import Reference, in_threads, load_reference, make_soft_prompt, sample_texts, save_prompt

TEXT = Path(__file__).parents[3] / "examples" / "manual" / "context.md"
PACKINGS = (KvFormat.INT8, KvFormat.K6V4)
BITS = {KvFormat.INT8: (8, 8), KvFormat.K6V4: (6, 4)}
GROUP = 32
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    assert build_kernels()


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def turned(rows: torch.Tensor) -> torch.Tensor:
    """Every 32 numbers of the last dimension times the Hadamard matrix, in float64."""
    return (rows.double().unflatten(-1, (-1, GROUP)) @ hadamard(GROUP)).flatten(-2)


def pack(rows: torch.Tensor, packing: KvFormat, *, are_keys: bool) -> torch.Tensor:
    return ops.pack_rows(rows.float(), packing, are_keys)


def parts(
    packed: torch.Tensor, packing: KvFormat, *, are_keys: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [..., groups, 32], scales and offsets [..., groups, 1] of packed rows, by the layout that is documented."""
    bits = BITS[packing][0 if are_keys else 1]
    head = 2 if are_keys else 4
    groups = packed.unflatten(-1, (-1, head + GROUP * bits // 8))
    numbers = groups[..., :head].contiguous().view(torch.bfloat16).double()
    codes = groups[..., head:].int()
    if bits < 8:
        low = torch.cat([codes[..., :16] & 15, codes[..., :16] >> 4], -1)
        upper = [codes[..., 16 + i // 4] >> 2 * (i % 4) & 3 for i in range(GROUP)] if bits == 6 else []
        codes = low | torch.stack(upper, -1) << 4 if upper else low
    scale = numbers[..., :1]
    offset = -(2 ** (bits - 1)) * scale if are_keys else numbers[..., 1:]
    return codes, scale, offset


def unpack(packed: torch.Tensor, packing: KvFormat, *, are_keys: bool) -> torch.Tensor:
    """The numbers that packed rows stand for, keys turned back."""
    codes, scale, offset = parts(packed, packing, are_keys=are_keys)
    rows = (codes * scale + offset).flatten(-2)
    return turned(rows) if are_keys else rows


def positions_of(batch: PagedBatch) -> list[int]:
    counts = batch.query_start.diff().tolist()
    ends = batch.context_len.tolist()
    return [position for end, count in zip(ends, counts, strict=True) for position in range(end - count, end)]


def through(packing: KvFormat, plain: KVCache | None = None, offsets: KeyOffsets | None = None) -> AttentionBackend:
    """The reference over keys and values as a packed cache has them, in the cache `plain`, which is not packed."""

    def backend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        kind: AttentionKind = CAUSAL,
    ) -> torch.Tensor:
        common: Any = 0
        if plain is not None and offsets is not None:
            layer = next(index for index, keys in enumerate(plain.keys) if keys is key_cache)
            common = offsets.turned(int(batch.context_len.max()))[layer, positions_of(batch)]
        key = (unpack(pack(key - common, packing, are_keys=True), packing, are_keys=True) + common).to(key.dtype)
        value = unpack(pack(value, packing, are_keys=False), packing, are_keys=False).to(value.dtype)
        return reference(query, key, value, key_cache, value_cache, batch, scale, kind)

    return backend


def make_cache(model: Any, dtype: torch.dtype, packing: KvFormat) -> KVCache:
    return decoders.make_cache(model, dtype, kv_format=packing)


def wide_model(dtype: torch.dtype = torch.float32, name: str = "llama", heads: int = 8) -> Any:
    """The configuration with heads of 32 numbers."""
    config = decoders.CONFIGS[name]
    changed = {"hidden_size": 16 * heads, "head_dim": 32, "num_attention_heads": heads, "num_key_value_heads": 2}
    return make_model(config.__class__(**{**config.to_dict(), **changed}), dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    packing=st.sampled_from(PACKINGS),
    head_dim=st.sampled_from([32, 64, 96, 128, 256]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 300.0, 1e20]),
    shift=st.sampled_from([0.0, 0.3, 5.0]),
    outlier=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 1 << 20),
)
def test_no_number_is_further_off_than_its_step_allows(
    packing: KvFormat, head_dim: int, size: float, shift: float, outlier: float, seed: int
) -> None:
    rows = (torch.randn(5, 2, head_dim, generator=torch.Generator().manual_seed(seed)) + shift) * size
    rows[..., 3] *= outlier
    for are_keys in (True, False):
        bits = BITS[packing][0 if are_keys else 1]
        packed = pack(rows, packing, are_keys=are_keys)
        codes, scale, offset = parts(packed, packing, are_keys=are_keys)
        given_ = (turned(rows) if are_keys else rows.double()).unflatten(-1, (-1, GROUP))
        error = (codes * scale + offset - given_).abs()
        # Half a step, and what rounding the scale or the offset to bfloat16 cuts off at the ends.
        top = given_.abs().amax(-1, keepdim=True)
        assert (error <= 0.501 * scale + top / 128 + 1e-6 * top).all()
        width = 2 * top if are_keys else given_.amax(-1, keepdim=True) - given_.amin(-1, keepdim=True)
        assert (scale <= 1.01 * width / (2**bits - 2)).all()
        assert codes.max() == 2**bits - 1 or (scale == 0).any() or packing is KvFormat.INT8


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("value", [0.0, -7.25, 1e-38, 3e38])
def test_a_row_of_one_number(packing: KvFormat, value: float) -> None:
    rows = torch.full((1, 64), value)
    found = unpack(pack(rows, packing, are_keys=False), packing, are_keys=False)
    assert ((found - rows).abs() <= abs(value) / 250).all()


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_come_out_as_a_number(packing: KvFormat, value: float) -> None:
    rows = torch.randn(3, 64)
    rows[1, 40] = value
    for are_keys in (True, False):
        found = unpack(pack(rows, packing, are_keys=are_keys), packing, are_keys=are_keys).isfinite()
        assert found[0].all()
        assert found[2].all()
        assert found[1, :32].all()
        assert not found[1, 32:].any()


@pytest.mark.parametrize("weights", [WeightFormat.FLOAT32, WeightFormat.BFLOAT16, WeightFormat.INT8], ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_decoder_attends_over_the_packed_rows(packing: KvFormat, name: str, weights: WeightFormat) -> None:
    """Decoding, chunks and whole prompts. In float32 it is attention over what was packed, but for the odd number at
    the border between two codes, of which one batch in ten has enough to be felt; what bfloat16 and int8 weights round
    moves more of them over it."""
    dtype = torch.float32 if weights is WeightFormat.FLOAT32 else torch.bfloat16
    model = wide_model(dtype, name)
    assert supports(model, dtype)
    steps = [(40, 1), (0, 37), (5, 12), (100, 1), (16, 16), (600, 1)]
    in_float32 = deepcopy(model).float()
    plain = make_cache(in_float32, torch.float32, KvFormat.PLAIN)
    shares = []
    for seed in range(3):
        found, rounded = (
            decoders.run(DecoderForward(model, make_cache(model, dtype, p), weights), steps, seed)
            for p in (packing, KvFormat.PLAIN)
        )
        expected = decoders.run(TransformersForward(in_float32, plain, through(packing)), steps, seed)
        exact = decoders.run(TransformersForward(in_float32, plain, reference), steps, seed)
        packed, rest = distance(exact, expected), distance(rounded, exact)
        assert packed > 5e-3
        shares.append(max(distance(found, expected) - (0 if weights is WeightFormat.FLOAT32 else rest), 0) / packed)
    assert sorted(shares)[1] < 0.02 if weights is WeightFormat.FLOAT32 else max(shares) < 0.6


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_windows_and_softcaps_over_packed_rows(packing: KvFormat, name: str) -> None:
    model = wide_model(torch.float32, name)
    steps = [(40, 1), (0, 37), (5, 12), (100, 1), (16, 16)]
    plain, shares = make_cache(model, torch.float32, KvFormat.PLAIN), []
    for seed in range(3):
        decoder = DecoderForward(model, make_cache(model, torch.float32, packing), WeightFormat.FLOAT32)
        expected = decoders.run(TransformersForward(model, plain, through(packing)), steps, seed)
        exact = decoders.run(TransformersForward(model, plain, reference), steps, seed)
        shares.append(distance(decoders.run(decoder, steps, seed), expected) / distance(exact, expected))
    assert sorted(shares)[1] < 0.02


BIASED = {
    "qwen2": {},
    "qwen2, windows": {},
    "phi3, partial rotary": {},
    "llama3 rope, biases": {},
    "smollm3": {"attention_bias": True},
}


def biased_model(dtype: torch.dtype, name: str = "qwen2", heads: int = 8) -> Any:
    """With biases of keys many times as large as the rest of a key, as Qwen2.5 has them."""
    config = decoders.CONFIGS[name]
    changed = {"hidden_size": 16 * heads, "head_dim": 32, "num_attention_heads": heads, "num_key_value_heads": 2}
    model = make_model(config.__class__(**{**config.to_dict(), **changed, **BIASED[name]}), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        attention = layer.self_attn
        bias = torch.randn(64, generator=generator) * 3
        bias[torch.randperm(64, generator=generator)[:6]] *= 10
        if hasattr(attention, "qkv_proj"):
            attention.qkv_proj.bias = torch.nn.Parameter(torch.zeros(attention.qkv_proj.out_features))
            attention.qkv_proj.bias.data[-128:-64] = bias
        else:
            attention.k_proj.bias.data = bias
        for product in (attention.qkv_proj,) if hasattr(attention, "qkv_proj") else (attention.q_proj,):
            product.weight.data[: 32 * heads] *= 0.1  # or each query would see a single key
    return model.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("name", BIASED)
def test_biases_of_keys_are_not_packed(packing: KvFormat, name: str) -> None:
    """What is left of keys is packed as if there were none, and scores are those of whole keys."""
    model = biased_model(torch.float32, name)
    offsets = key_offsets_of(model)
    assert offsets is not None
    steps = [(40, 1), (0, 37), (5, 12), (100, 1), (16, 16), (600, 1)]
    plain = make_cache(model, torch.float32, KvFormat.PLAIN)
    shares, packed, packed_whole = [], 0.0, 0.0
    for seed in range(3):
        decoder = DecoderForward(model, make_cache(model, torch.float32, packing), WeightFormat.FLOAT32)
        found = decoders.run(decoder, steps, seed)
        expected, whole, exact = (
            decoders.run(TransformersForward(model, plain, backend), steps, seed)
            for backend in (through(packing, plain, offsets), through(packing), reference)
        )
        packed += distance(expected, exact)
        packed_whole += distance(whole, exact)
        shares.append(distance(found, expected) / distance(exact, expected))
    assert sorted(shares)[1] < 0.05
    assert packed < packed_whole * 0.95 or packing is KvFormat.K6V4  # whose values are packed in 4 bits, and cost more


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_large_biases_cost_nothing_in_bfloat16(packing: KvFormat) -> None:
    """The products of queries with what keys lack are rounded as those with whole keys are."""
    model = biased_model(torch.bfloat16)
    steps = [(40, 1), (0, 37), (100, 1), (600, 1)]
    plain = make_cache(model.float(), torch.float32, KvFormat.PLAIN)
    exact = decoders.run(TransformersForward(model, plain, reference), steps)
    model = model.to(torch.bfloat16)
    rounded, found = (
        distance(decoders.run(DecoderForward(model, make_cache(model, torch.bfloat16, each)), steps), exact)
        for each in (KvFormat.PLAIN, packing)
    )
    assert found < rounded + {KvFormat.INT8: 0.01, KvFormat.K6V4: 0.1}[packing]


@pytest.mark.parametrize("name", ["qwen2", "phi3, partial rotary"])
def test_a_soft_prompt_lacks_what_computed_keys_lack(name: str) -> None:
    model = biased_model(torch.float32, name)
    plain, packed = (make_cache(model, torch.float32, each) for each in (KvFormat.PLAIN, KvFormat.INT8))
    batch = build_batch([Row(0, list(range(40)), [4, 2, 7], range(0))], 16, CPU)
    with torch.inference_mode():
        for cache in (plain, packed):
            DecoderForward(model, cache, WeightFormat.FLOAT32)(batch)
    keys, values = (
        torch.stack([rows[[4, 2, 7]].transpose(1, 2).flatten(0, 1)[:40] for rows in each])
        for each in (plain.keys, plain.values)
    )
    staged = packed.stage(keys, values)
    computed = torch.stack(packed.keys)[:, [4, 2, 7]]
    same = (staged.keys == computed)[0, :, :, :8]  # what other layers are given, packed rows have changed
    assert same.float().mean() > 0.98  # the odd number lies at the border between two codes, now and then a scale


@pytest.mark.parametrize("packing", KvFormat, ids=str)
@pytest.mark.parametrize("make", [wide_model, biased_model])
def test_rows_behind_one_context_attend_as_they_do_alone(packing: KvFormat, make: Callable[..., Any]) -> None:
    """Whatever the cache holds, keys that sequences share are walked once for all."""
    model = make(torch.float32)
    decoder = DecoderForward(model, make_cache(model, torch.float32, packing), WeightFormat.FLOAT32)
    rows = make_rows([(330 + s, 1) for s in range(6)], seed=1)
    shared, tokens = rows[0].block_table[:20], torch.randint(decoders.VOCAB, (340,)).tolist()
    rows = [replace(row, block_table=[*shared, *row.block_table[20:]]) for row in rows]
    with torch.inference_mode():
        for row in rows:
            decoder(build_batch([Row(0, tokens[: row.start], row.block_table, range(0))], 16, CPU))
        together = decoder(build_batch(rows, 16, CPU)).clone()
        alone = torch.cat([decoder(build_batch([row], 16, CPU)).clone() for row in rows])
    assert not torch.equal(together, alone)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("heads", [2, 6, 10])
@pytest.mark.parametrize("make", [wide_model, biased_model])
def test_a_row_does_not_depend_on_its_company_or_the_threads(
    packing: KvFormat, heads: int, make: Callable[..., Any]
) -> None:
    model = make(torch.bfloat16, heads=heads)
    decoder = DecoderForward(model, make_cache(model, torch.bfloat16, packing))
    rows = make_rows([(0, 20), (0, 3), *[(0, 1)] * 20])
    with torch.inference_mode():
        together = decoder(build_batch(rows, 16, CPU)).clone()
        for count in (1, 2, 5):
            with in_threads(count):
                assert torch.equal(decoder(build_batch(rows, 16, CPU)), together)
        for index in (0, 1, 2, 21):
            assert torch.equal(decoder(build_batch([rows[index]], 16, CPU))[0], together[index])


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_nan_stays_in_its_row(packing: KvFormat) -> None:
    model = wide_model()
    decoder = DecoderForward(model, make_cache(model, torch.float32, packing))
    rows = [Row(0, [5, 9], [0], range(1, 2)), Row(0, [7], [1], range(1)), Row(0, [6], [2], range(1))]
    batch = build_batch(rows, 16, CPU)
    broken = torch.full((1, 16 * 8), float("nan"))
    with torch.inference_mode():
        assert decoder(batch).isfinite().all()
        rows[1] = Row(0, (), [1], range(1), embeddings=broken)
        assert decoder(build_batch(rows, 16, CPU)).isfinite().all(dim=1).tolist() == [True, False, True]


@given(st.sampled_from(PACKINGS), st.integers(1, 8), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_soft_prompt_lies_in_its_blocks_and_touches_no_other(
    packing: KvFormat, block_size: int, data: st.DataObject
) -> None:
    layers, num_blocks, kv_heads, head_dim = 3, 9, 2, 32
    length = data.draw(st.integers(1, 3 * block_size))
    blocks = data.draw(st.permutations(range(num_blocks)))[: -(-length // block_size)]
    keys, values = torch.randn(2, layers, length, kv_heads, head_dim)
    cache = KVCache(
        num_layers=layers,
        num_blocks=num_blocks,
        num_kv_heads=kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device=CPU,
        kv_format=packing,
    )
    assert (
        cache.bytes_per_block
        == layers * kv_heads * block_size * {KvFormat.INT8: 34 + 36, KvFormat.K6V4: 26 + 20}[packing]
    )
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(7)

    cache.write(blocks, cache.stage(keys, values))

    for held, rows, are_keys in ((cache.keys, keys, True), (cache.values, values, False)):
        expected = pack(rows, packing, are_keys=are_keys)
        for layer in range(layers):
            for position in range(length):
                found = held[layer][blocks[position // block_size], :, position % block_size]
                assert torch.equal(found, expected[layer, position])
            others = [block for block in range(num_blocks) if block not in blocks]
            assert (held[layer][others] == 7).all()


# ---- the embedded model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "kl", "agreement"), [(KvFormat.INT8, 2e-3, 0.97), (KvFormat.K6V4, 0.015, 0.93)])
def test_how_near_the_embedded_model_stays(smollm2: Reference, packing: KvFormat, kl: float, agreement: float) -> None:
    tokens = smollm2.tokenizer(TEXT.read_text())["input_ids"][:512]
    with torch.inference_mode():
        expected = smollm2.model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    interface.register()
    model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.bfloat16)
    far, agreed = closeness(DecoderForward(model, make_cache(model, torch.bfloat16, packing)), tokens, expected)
    assert far < kl
    assert agreed > agreement


# ---- engines, on a tiny model: what is packed where is the same with any weights ------------------------------------


@pytest.fixture(scope="module")
def qwen3(tiny_models: dict[str, str]) -> Reference:
    """Its heads are of a size that can be packed."""
    return load_reference(tiny_models["qwen3"])


def make_engine(path: str, packing: KvFormat | str, **overrides: Any) -> Any:
    options = {"model": path, "dtype": "float32", "device": "cpu", "kv_cache_gib": 0.1, "kv_cache_dtype": str(packing)}
    engine, ready = build_engine(EngineConfig(**(options | overrides)), lambda *_: None)
    return engine, ready


def answers(engine: Any, prompts: Sequence[list[int]], ref: SoftPromptRef | None = None) -> list[list[int]]:
    received, _, _ = run(engine, [request(str(i), ids, 24, ref) for i, ids in enumerate(prompts)])
    check_empty(engine)
    return [received[str(i)] for i in range(len(prompts))]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_answers_do_not_depend_on_chunks_preemption_or_the_batch(qwen3: Reference, packing: KvFormat) -> None:
    """Nor does a cache that is out of blocks; each against the same prompt alone."""
    prompts = [qwen3.tokenizer(text)["input_ids"] for text in sample_texts(16)]
    alone, ready = make_engine(qwen3.path, packing, max_model_len=128)
    expected = [answers(alone, [ids])[0] for ids in prompts]
    bytes_per_block = 0.1 * 2**30 / ready.num_blocks / 4  # of four tokens
    tight, ready = make_engine(
        qwen3.path,
        packing,
        kv_cache_gib=36.5 * bytes_per_block / 2**30,
        block_size=4,
        max_batch_size=7,
        max_batch_tokens=19,
        max_model_len=128,
    )
    received, preemptions, chunks = run(tight, [request(str(i), ids, 24) for i, ids in enumerate(prompts)])
    assert preemptions > 0
    assert chunks > 0
    same = sum(received[str(i)] == expected[i] for i in range(len(prompts)))
    assert same >= len(prompts) - 1  # sums in another order may move a number over the border between two codes


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_soft_prompts_steer_as_without_packing(qwen3: Reference, kind: str, tmp_path: Path) -> None:
    prompts = [qwen3.tokenizer(text)["input_ids"] for text in sample_texts(8)]
    found = {}
    for packing in ("auto", "int8"):
        engine, ready = make_engine(qwen3.path, packing)
        prompt: SoftPrompt = make_soft_prompt(kind, 37, ready.model, seed=4)
        path = save_prompt(prompt, tmp_path, f"{kind}-{packing}")
        ref = SoftPromptRef(sha256="a" * 64, path=str(path), num_virtual_tokens=37)
        found[packing] = answers(engine, prompts, ref)
        assert found[packing] != answers(engine, prompts)
    first = [[tokens[0] for tokens in found[packing]] for packing in ("auto", "int8")]
    assert sum(a == b for a, b in zip(*first, strict=True)) >= 7


def test_a_third_of_the_memory_holds_as_many_tokens(tiny_models: dict[str, str]) -> None:
    blocks = {
        p: make_engine(tiny_models["qwen3"], p, dtype="bfloat16")[1].num_blocks for p in ("auto", *map(str, PACKINGS))
    }
    assert 1.8 < blocks["int8"] / blocks["auto"] < 1.9
    assert 2.7 < blocks["k6v4"] / blocks["auto"] < 2.8


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("gpt2", "float32", r"--kv-cache-dtype int8 takes a CPU.*GPT2LMHeadModel in float32.*--kv-cache-dtype auto"),
        ("qwen3", "float16", r"--kv-cache-dtype int8 takes a CPU.*Qwen3ForCausalLM in float16"),
        (
            "llama",
            "float32",
            r"int8: a packed cache takes heads of a multiple of 32 numbers, not 8.*; use --kv-cache-",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(tiny_models: dict[str, str], name: str, dtype: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_engine(tiny_models[name], "int8", dtype=dtype)


def test_on_a_gpu_it_is_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(loader, "resolve", lambda *_: pytest.fail("the model's files were looked for"))
    for options, message in (
        ({"kv_cache_dtype": "k6v4"}, "--kv-cache-dtype k6v4 takes a CPU: use --device cpu, or --kv-cache-dtype auto"),
        ({"quantization": "int8"}, "--quantization int8 takes a CPU: use --device cpu, or --quantization none"),
        ({"quantization": "native"}, "--quantization native takes a CPU: use --device cpu, or --quantization none"),
    ):
        with pytest.raises(ModelError, match=message):
            build_engine(EngineConfig(model="smollm2-135m", dtype="bfloat16", **options), lambda *_: None)
