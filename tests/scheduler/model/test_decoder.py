"""The decoder in C++ against transformers' own modelling code, in every weight format."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
)

from softbatch.scheduler.engine.engine import build_engine
from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.attention.reference import reference
from softbatch.scheduler.model.batch import Row, build_batch
from softbatch.scheduler.model.cpu import build as kernel_build
from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import KvFormat, WeightFormat
from softbatch.scheduler.model.forward import TransformersForward
from softbatch.scheduler.model.llama.decoder import LONG_STEP, DecoderForward, plain_weights, supports
from softbatch.scheduler.model.llama.description import DecoderParts, layer_weights
from softbatch.scheduler.model.source import ModelError
from softbatch.scheduler.protocol import EngineConfig
from tests.support.decoders import (
    BLOCKS,
    CONFIGS,
    CPU,
    VOCAB,
    closeness,
    decoder_of,
    distance,
    make_cache,
    make_decoder,
    make_model,
    make_rows,
    run,
)
from tests.support.models import Reference, in_threads

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
pytestmark = needs_compiler


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    assert build_kernels()


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_equals_transformers(name: str) -> None:
    """One sequence, chunks and decoding mixed, more rows than a tile; keys and values lie in the cache alike."""
    model = make_model(CONFIGS[name], torch.float32)
    assert supports(model, torch.float32)
    ours, theirs = make_cache(model, torch.float32), make_cache(model, torch.float32)
    decoder, plain = DecoderForward(model, ours), TransformersForward(model, theirs, reference)
    for steps in ([(0, 1)], [(40, 1), (0, 37), (5, 12), (100, 1), (16, 16)], [(i, 1) for i in range(1, 40)]):
        assert distance(run(decoder, steps), run(plain, steps)) < 2e-5
        for mine, expected in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("weights", WeightFormat, ids=str)
def test_near_transformers_in_every_format(weights: WeightFormat) -> None:
    """As near as the format is fine; what is rounded may not add up to more."""
    dtype = torch.float32 if weights is WeightFormat.FLOAT32 else torch.bfloat16
    model = make_model(CONFIGS["qwen3"], dtype)
    steps = [(40, 1), (0, 37), (5, 12), *[(9, 1)] * 20]
    found = run(decoder_of(model, weights), steps)
    model = model.float()
    expected = run(TransformersForward(model, make_cache(model, torch.float32), reference), steps)
    assert distance(found, expected) < {WeightFormat.FLOAT32: 2e-5, WeightFormat.INT8: 0.05}.get(weights, 0.02)


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
)
def test_any_batch_in_float32(steps: list[tuple[int, int]], seed: int) -> None:
    model = make_model(CONFIGS["qwen2"], torch.float32)
    decoder = DecoderForward(model, make_cache(model, torch.float32))
    plain = TransformersForward(model, make_cache(model, torch.float32), reference)
    assert distance(run(decoder, steps, seed), run(plain, steps, seed)) < 2e-5


@pytest.mark.parametrize("weights", WeightFormat, ids=str)
def test_a_row_does_not_depend_on_its_company_or_the_threads(weights: WeightFormat) -> None:
    decoder = make_decoder("llama", weights)
    rows = make_rows([(0, 20), (0, 3), *[(0, 1)] * 20])
    with torch.inference_mode():
        together = decoder(build_batch(rows, 16, CPU)).clone()
        for count in (1, 2, 5):
            with in_threads(count):
                assert torch.equal(decoder(build_batch(rows, 16, CPU)), together)
        for index in (0, 1, 2, 21):
            assert torch.equal(decoder(build_batch([rows[index]], 16, CPU))[0], together[index])


@pytest.mark.parametrize("weights", WeightFormat, ids=str)
def test_rows_are_divided_among_threads(weights: WeightFormat) -> None:
    """On matrix tiles they are, from 24 tiles on: each thread multiplies its own by all panels."""
    decoder = make_decoder("llama", weights)
    rows = make_rows([(0, 450), (0, 1), (0, 333)], logits=False)
    with torch.inference_mode(), in_threads(1):
        alone = decoder(build_batch(rows, 16, CPU)).clone()
        assert torch.equal(decoder(build_batch(rows[2:], 16, CPU)), alone[451:])
        for count in (2, 3, 5):
            with in_threads(count):
                assert torch.equal(decoder(build_batch(rows, 16, CPU)), alone)


@pytest.mark.parametrize("weights", WeightFormat, ids=str)
def test_logits_of_a_position_are_the_same_whoever_else_wants_any(weights: WeightFormat) -> None:
    decoder = make_decoder("qwen3", weights)
    rows = make_rows([(0, 20), (0, 3), (0, 1), (0, 9)], logits=False)
    with torch.inference_mode():
        everywhere = decoder(build_batch(rows, 16, CPU)).clone()
        some = [range(20), range(0), range(1), range(4, 9)]
        asked = [replace(row, logit_rows=wanted) for row, wanted in zip(rows, some, strict=True)]
        assert torch.equal(decoder(build_batch(asked, 16, CPU)), everywhere[[*range(20), 23, *range(28, 33)]])
        none = [replace(row, logit_rows=range(0)) for row in rows]
        assert decoder(build_batch(none, 16, CPU)).shape == (0, VOCAB)


@pytest.mark.parametrize("weights", WeightFormat, ids=str)
def test_nan_stays_in_its_row(weights: WeightFormat) -> None:
    dtype = torch.float32 if weights is WeightFormat.FLOAT32 else torch.bfloat16
    model = make_model(
        CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "tie_word_embeddings": False}), dtype
    )
    decoder = decoder_of(model, weights)
    model.get_input_embeddings().weight[7] = float("nan")
    rows = [Row(0, [5, 9], [0], range(1, 2)), Row(0, [7], [1], range(1)), Row(0, [6], [2], range(1))]
    with torch.inference_mode():
        logits = decoder(build_batch(rows, 16, CPU))
    assert logits.isfinite().all(dim=1).tolist() == [True, False, True]


def test_formats_have_the_same_numbers_in_both_languages() -> None:
    assert {str(each): each.value for each in WeightFormat} == ops.weight_formats()
    assert {str(each): each.value for each in KvFormat} == ops.kv_formats()
    assert not set(ops.weight_formats().values()) & set(ops.kv_formats().values()), "a mix-up must be refused"


def test_which_processors_take_bfloat16_in_12_bits() -> None:
    """Those that can take it apart."""
    assert plain_weights(torch.float32) is WeightFormat.FLOAT32
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    can = {"avx512_bf16", "avx512vbmi"} <= set(cpuinfo.split())
    assert plain_weights(torch.bfloat16) is (WeightFormat.BFLOAT16_IN_12_BITS if can else WeightFormat.BFLOAT16)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strange", [0.0, 0.001, 0.3])
def test_12_bits_lose_nothing(name: str, strange: float) -> None:
    """Logits are the same bit for bit: with weights such as they are, and with some, or many, of any magnitude: zeros
    of both signs, numbers that are not normal, and what has no other like it in its panel."""
    model = make_model(CONFIGS[name], torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            powers = torch.randint(-130, 3, parameter.shape, generator=generator)
            changed = torch.rand(parameter.shape, generator=generator) < strange
            parameter.copy_(torch.where(changed, torch.ldexp(parameter, powers).bfloat16(), parameter))
            parameter[::3, ::5] = -0.0
    plain, packed = (
        decoder_of(model, weights) for weights in (WeightFormat.BFLOAT16, WeightFormat.BFLOAT16_IN_12_BITS)
    )
    # One row, two matrix tiles of rows, and more: a panel is taken apart for as many as there are.
    for steps in ([(0, 1)], [(40, 1), (0, 37), (5, 12)], [(i, 1) for i in range(1, 15)], [(0, 24)], [(0, 150)]):
        expected = run(plain, steps)
        assert expected.isfinite().all()
        assert torch.equal(run(packed, steps), expected)


@pytest.mark.parametrize(("total", "available", "plenty"), [(34, 33, True), (20, 20, False), (34, 18, False)])
def test_long_steps_take_weights_that_need_not_be_taken_apart(
    total: int, available: int, plenty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is plenty; each of the two alone gives the same."""
    memory = SimpleNamespace(total=1 << total, available=1 << available)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    model = make_model(CONFIGS["llama"], torch.bfloat16)
    packed = decoder_of(model, WeightFormat.BFLOAT16_IN_12_BITS)
    assert packed.weights_of_long_steps is WeightFormat.BFLOAT16_IN_12_BITS
    decoder = DecoderForward(model, make_cache(model, torch.bfloat16))
    assert decoder.weights == plain_weights(torch.bfloat16)
    assert decoder.weights_of_long_steps == (WeightFormat.BFLOAT16 if plenty else decoder.weights)
    used = []
    for name in ("_decoder", "_decoder_of_long_steps"):
        inner = getattr(decoder, name)
        forward = partial(lambda name, inner, *inputs: (used.append(name), inner.forward(*inputs))[1], name, inner)
        monkeypatch.setattr(decoder, name, SimpleNamespace(forward=forward))
    # The second walks the keys and values that the other of the two has written.
    for steps in ([(0, LONG_STEP)], [(LONG_STEP, 5), (1, LONG_STEP - 6)], [(3, LONG_STEP - 1)]):
        assert torch.equal(run(decoder, steps), run(packed, steps))
    assert used == [f"_decoder{name}" for name in ("_of_long_steps", "_of_long_steps", "", "", "")]


TEXT = Path(__file__).parents[3] / "examples" / "manual" / "context.md"


@pytest.fixture(scope="module")
def log_probs(smollm2: Reference) -> tuple[list[int], torch.Tensor]:
    """512 tokens of an example, and the model's own log-probabilities in float32 at each."""
    tokens = smollm2.tokenizer(TEXT.read_text())["input_ids"][:512]
    with torch.inference_mode():
        logits = smollm2.model(torch.tensor([tokens]), use_cache=False).logits[0]
    return tokens, logits.log_softmax(-1)


def test_real_model_in_bfloat16_and_int8(smollm2: Reference, log_probs: tuple[list[int], torch.Tensor]) -> None:
    """bfloat16 through the decoder is nearer to float32 than through transformers, whose residuals are rounded."""
    tokens, expected = log_probs
    interface.register()
    model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.bfloat16)
    model.set_attn_implementation(interface.ATTENTION_NAME)
    theirs, _ = closeness(TransformersForward(model, make_cache(model, torch.bfloat16), reference), tokens, expected)
    ours, agreed = closeness(DecoderForward(model, make_cache(model, torch.bfloat16)), tokens, expected)
    assert ours < 5e-4
    assert ours < theirs
    assert agreed > 0.98
    quantized, agreed = closeness(
        DecoderForward(model, make_cache(model, torch.bfloat16), WeightFormat.INT8), tokens, expected
    )
    assert ours < quantized < 8e-3
    assert agreed > 0.94


def test_what_runs_in_one_call() -> None:
    assert supports(make_model(CONFIGS["qwen3"], torch.float32), torch.float32)
    assert not supports(make_model(CONFIGS["qwen3"], torch.float16), torch.float16)
    gelu = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "hidden_act": "gelu"})
    assert not supports(make_model(gelu, torch.float32), torch.float32)
    dynamic = LlamaConfig(
        **{**CONFIGS["llama"].to_dict(), "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    )
    assert not supports(make_model(dynamic, torch.float32), torch.float32)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=VOCAB))
    assert not supports(gpt2, torch.float32)


def test_whether_a_model_is_supported_is_asked_without_building_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "are_loaded", lambda: False)
    monkeypatch.setattr(kernel_build, "_cached_library", lambda: pytest.fail("the kernels were looked for"))
    assert supports(make_model(CONFIGS["llama"], torch.float32), torch.float32)


def test_an_adapter_is_not_left_out() -> None:
    """peft puts modules of its own in the place of linear layers, whose `weight` is the base model's."""
    model = make_model(CONFIGS["llama"], torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["v_proj"], r=2))
    assert not supports(model, torch.float32)


def test_weights_of_a_layer_go_by_name() -> None:
    weights = layer_weights(make_model(CONFIGS["llama"], torch.float32).model.layers[0], DecoderParts())
    layers = ops.make_layers(WeightFormat.FLOAT32, 8, 2, 8, 1e-5)
    layers.add_layer(dict(reversed(weights.items())))
    with pytest.raises(RuntimeError, match="a layer must have the tensor gate"):
        layers.add_layer({name: weight for name, weight in weights.items() if name != "gate"})
    with pytest.raises(RuntimeError, match="tensors that these kernels do not know"):
        layers.add_layer(weights | {"up_bias": weights["mlp_norm"]})


def test_bad_metadata_is_refused_before_anything_is_written() -> None:
    model = make_model(CONFIGS["llama"], torch.float32)
    cache = make_cache(model, torch.float32)
    decoder = DecoderForward(model, cache)
    for row in (Row(0, [1, 2], [BLOCKS], range(1)), Row(0, [1], [0], range(3, 4)), Row(0, [1], [-1], range(1))):
        with pytest.raises(RuntimeError, match=r"block_table|logit_rows"), torch.inference_mode():
            decoder(build_batch([row], 16, CPU))
    assert all(tensor.isnan().all() for tensor in (*cache.keys, *cache.values))


@pytest.mark.parametrize(
    ("test", "argument", "limit"),
    [("float32_equals_transformers", "'llama'", "1"), ("rows_are_divided_among_threads", "WeightFormat.BFLOAT16", "2")],
)
def test_fewer_threads_than_asked_for(test: str, argument: str, limit: str) -> None:
    """What OpenMP grants may be less than what torch says: nobody may wait for a thread that never came, and no row
    be left to it."""
    code = f"""
from tests.scheduler.model import test_decoder
from tests.scheduler.model.test_decoder import WeightFormat
assert test_decoder.build_kernels()
test_decoder.test_{test}({argument})
print("done")
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": limit, "OMP_NUM_THREADS": "4"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["done"], found.stderr


def test_threads_need_not_agree_on_how_many_they_are() -> None:
    """torch's number belongs to each thread, and new threads have what was set last by any: here 1, as for the engine
    whose reader of soft prompts keeps to itself."""
    code = """
import threading, torch
from tests.support.decoders import *
torch.set_num_threads(1)
decoder, rows = make_decoder("llama", WeightFormat.BFLOAT16), make_rows([(0, 500)])
torch.set_num_threads(3)
thread = threading.Thread(target=torch.set_num_threads, args=(1,))
thread.start()
thread.join()
with torch.inference_mode():
    found = decoder(build_batch(rows, 16, CPU)).clone()
    torch.set_num_threads(1)
    assert torch.equal(decoder(build_batch(rows, 16, CPU)), found)
print("done")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["done"], found.stderr


def test_int8_of_a_model_that_cannot_is_refused(tiny_models: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"--quantization int8 takes a CPU.*GPT2LMHeadModel in float32 on cpu"):
        build_engine(EngineConfig(model=tiny_models["gpt2"], quantization="int8", dtype="float32"), lambda *_: None)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such thing on this system")
def test_threads_stay_on_processors_of_their_own_during_a_step_and_not_longer() -> None:
    two = set(sorted(os.sched_getaffinity(0))[:2])
    if len(two) < 2:
        pytest.skip("takes two processors")
    decoder, steps = make_decoder("qwen2", WeightFormat.BFLOAT16), [(0, 500)] * 4
    seen: set[frozenset[int]] = set()
    running = threading.Event()

    def step() -> set[int]:
        os.sched_setaffinity(threading.get_native_id(), two)
        running.set()
        until = time.monotonic() + 30
        while frozenset({min(two)}) not in seen and time.monotonic() < until:
            run(decoder, steps)
        return os.sched_getaffinity(threading.get_native_id())

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(threading.get_native_id).result()
        pool.submit(torch.set_num_threads, 2).result()
        found = pool.submit(step)
        running.wait()
        while not found.done():
            seen.add(frozenset(os.sched_getaffinity(worker)))
            time.sleep(1e-4)
        pool.submit(torch.set_num_threads, threads).result()
    assert frozenset({min(two)}) in seen
    assert found.result() == two
