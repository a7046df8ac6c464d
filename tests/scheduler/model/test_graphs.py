"""Steps through padded batches in static memory equal steps without, and padding touches nobody's blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from softbatch.scheduler.model import transformers_attention as interface
from softbatch.scheduler.model.attention.reference import reference
from softbatch.scheduler.model.attention.tiles import Planner
from softbatch.scheduler.model.attention.triton import TritonAttention, build
from softbatch.scheduler.model.batch import Row, build_batch
from softbatch.scheduler.model.cuda.buckets import BucketedBatches, decoding_sizes, mixed_sizes
from softbatch.scheduler.model.cuda.graphs import Capturer, CudaCapturer, GraphForward, Replay
from softbatch.scheduler.model.forward import TransformersForward
from softbatch.scheduler.model.kv_cache import KVCache
from tests.support import triton_device
from tests.support.call_again import CallAgain
from tests.support.families import longrope
from tests.support.models import tiny_config

BLOCKS, BLOCK_SIZE, MAX_BLOCKS = 40, 4, 8


def bucketed(
    decoding: tuple[int, ...],
    mixed: tuple[int, ...],
    max_logits: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    planner: Planner | None = None,
    by_length: bool = False,
) -> BucketedBatches:
    return BucketedBatches(decoding, mixed, max_logits, BLOCKS, BLOCK_SIZE, device, planner, by_length)


class Setup:
    """A tiny model, its cache (all NaN, with a scratch block behind the last), and both ways to run it."""

    def __init__(self, device: torch.device, capturer: Capturer, triton: bool, by_length: bool = False) -> None:
        torch.manual_seed(1)
        self.device, self.by_length = device, by_length
        positions = {"rope_parameters": longrope(4, 9)} if by_length else {}
        model = (
            AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=2, **positions))
            .eval()
            .requires_grad_(False)
            .to(device)
        )
        interface.register()
        model.set_attn_implementation(interface.ATTENTION_NAME)
        self.cache = KVCache(
            num_layers=2,
            num_blocks=BLOCKS,
            num_kv_heads=2,
            block_size=BLOCK_SIZE,
            head_dim=8,
            dtype=torch.float32,
            device=device,
            scratch_block=True,
        )
        for tensor in self.all_blocks():
            tensor.fill_(float("nan"))
        attention: Any = build(device) if triton else reference
        planner = None
        if isinstance(attention, TritonAttention):
            planner = attention.planner(heads=8, kv_heads=2, head_dim=8, dtype=torch.float32)
        self.eager = TransformersForward(model, self.cache, attention)
        self.batches = bucketed(decoding_sizes(6), (8, 24), 4, device, planner, by_length)
        self.graphs = GraphForward(self.eager, self.batches, MAX_BLOCKS, capturer)

    def all_blocks(self) -> list[torch.Tensor]:
        return [*self.cache.keys, *self.cache.values]

    def owned(self) -> list[torch.Tensor]:
        return [tensor[:BLOCKS].clone() for tensor in self.all_blocks()]

    @torch.inference_mode()
    def check(self, rows: list[Row]) -> None:
        """Both ways from the same cache: the same logits, the same blocks after."""
        before = [tensor.clone() for tensor in self.all_blocks()]
        expected = self.eager(build_batch(rows, BLOCK_SIZE, self.device, by_length=self.by_length)).clone()
        blocks = self.owned()
        for tensor, old in zip(self.all_blocks(), before, strict=True):
            tensor.copy_(old)
        found = self.graphs(self.batches(rows))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(self.owned(), blocks, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.fixture(params=["reference", "by length", *triton_device.DEVICES])
def make_setup(request: pytest.FixtureRequest) -> Callable[[], Setup]:
    if request.param in ("reference", "by length"):
        return lambda: Setup(torch.device("cpu"), CallAgain(), triton=False, by_length=request.param == "by length")
    device = triton_device.prepare(request.param)
    return lambda: Setup(device, CudaCapturer() if device.type == "cuda" else CallAgain(), triton=True)


def test_random_steps_through_static_buffers_equal_eager_ones(make_setup: Callable[[], Setup]) -> None:
    setup = make_setup()
    assert [shape.tokens for shape in setup.graphs.capture()] == [24, 8, 6, 4, 2, 1]
    rng = random.Random(4)
    free = list(range(BLOCKS))
    rng.shuffle(free)
    sequences: list[tuple[list[int], list[int]]] = []  # tokens, blocks
    for _ in range(5):
        tokens = [rng.randrange(1000) for _ in range(rng.randint(1, 20))]
        sequences.append((tokens, [free.pop() for _ in range(7)]))
    prefill = [Row(0, t, b, range(len(t) - 1, len(t))) for t, b in sequences]
    assert setup.batches(prefill).shape is None, "larger than any graph"
    setup.check(prefill)
    for _ in range(6):
        chosen = rng.sample(sequences, rng.randint(1, 5))
        rows = []
        for tokens, blocks in chosen:
            tokens.append(rng.randrange(1000))
            used = -(-len(tokens) // BLOCK_SIZE)
            rows.append(Row(len(tokens) - 1, tokens[-1:], blocks[:used], range(1)))
        setup.check(rows)
    for length in (2, 7, 19):
        decoding = [Row(len(t), [5], b, range(1)) for t, b in rng.sample(sequences, 2)]
        chunk = [rng.randrange(1000) for _ in range(length)]
        whole = Row(0, chunk, free, range(length - 1, length))
        setup.check([*decoding, whole])
        setup.check([Row(0, chunk[:1], free, range(0)), *decoding])


def test_all_graphs_leave_their_logits_in_one_place(make_setup: Callable[[], Setup]) -> None:
    setup = make_setup()
    list(setup.graphs.capture())
    with torch.inference_mode():
        first, second, third = (
            setup.graphs(setup.batches([Row(0, [7, 8][:tokens], [3], range(1))] * rows))
            for tokens, rows in ((1, 1), (1, 5), (2, 2))
        )
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()


def test_padding_rows_write_to_the_scratch_block_alone(make_setup: Callable[[], Setup]) -> None:
    setup = make_setup()
    list(setup.graphs.capture())
    before = setup.owned()
    with torch.inference_mode():
        setup.graphs(setup.batches([Row(0, [7], [3], range(1))] * 5))  # one row of padding, to make six
    for tensor, old in zip(setup.owned(), before, strict=True):
        old[3, :, 0] = tensor[3, :, 0]
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)
    assert not setup.cache.keys[0][BLOCKS, :, 0].isnan().any(), "the scratch block was not used"


def test_which_steps_are_filled_up_to_which_shape() -> None:
    batches = bucketed(decoding_sizes(4), (8, 16), 3)
    decoding, chunk = Row(5, [1], [1, 2], range(1)), Row(0, [1, 2, 3], [1], range(2, 3))

    def shape(*rows: Row) -> tuple[int, int, bool] | None:
        batch = batches(rows)
        assert batch.num_logits == sum(len(row.logit_rows) for row in rows)
        if batch.shape is None:
            return None
        assert len(batch.token_ids) == len(batch.attention.context_len) == batch.shape.tokens
        assert len(batch.logit_rows) == batch.shape.logits
        return batch.shape.tokens, batch.shape.logits, batch.shape.is_decoding

    assert shape(decoding) == (1, 1, True)
    assert shape(*[decoding] * 3) == (4, 4, True)
    assert shape(*[decoding] * 4) == (4, 4, True)
    assert shape(decoding, chunk) == (8, 3, False)
    assert shape(chunk, chunk, chunk) == (16, 3, False)
    assert shape(Row(5, [1], [1, 2], range(0))) == (8, 3, False)
    assert shape(*[decoding] * 5) is None, "more than any graph decodes"
    assert shape(*[chunk] * 6) is None, "more tokens than any graph"
    assert shape(Row(0, [1, 2, 3, 4], [1], range(4))) is None, "more logits"
    assert shape(chunk, Row(0, (), [1], range(1), embeddings=torch.zeros(1, 64))) is None


def test_shapes_end_with_the_largest_step_and_waste_little() -> None:
    assert decoding_sizes(1) == (1,)
    assert decoding_sizes(6) == (1, 2, 4, 6)
    assert decoding_sizes(4096)[-1] == 512
    sizes = decoding_sizes(256)
    assert sizes[-1] == 256
    assert len(sizes) < 30
    for batch in range(16, 257):
        size = next(size for size in sizes if size >= batch)
        assert size - batch < 0.5 * batch
    assert mixed_sizes(11) == (11,)
    assert mixed_sizes(64) == (16, 32, 64)
    assert mixed_sizes(8192)[-1] == 1024


def test_a_model_that_cannot_be_captured_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    def fails(run: Replay) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    setup = Setup(torch.device("cpu"), fails, triton=False)
    assert list(setup.graphs.capture()) == []
    assert "not permitted" in caplog.text
    setup.check([Row(0, [7], [3], range(1))])


def test_a_block_table_wider_than_the_static_one_is_run_eagerly() -> None:
    setup = Setup(torch.device("cpu"), CallAgain(), triton=False)
    list(setup.graphs.capture())
    tokens = list(range(100, 100 + BLOCK_SIZE * MAX_BLOCKS))
    blocks = list(range(MAX_BLOCKS + 1))
    with torch.inference_mode():
        setup.eager(build_batch([Row(0, tokens, blocks, range(0))], BLOCK_SIZE, setup.device))
    setup.check([Row(len(tokens), [9], blocks, range(1))])
