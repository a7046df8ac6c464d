"""The paged KV cache: what is written lies where attention looks for it, and nowhere else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.scheduler.model.kv_cache import KVCache

LAYERS, BLOCKS, KV_HEADS, HEAD_DIM = 3, 9, 2, 4


def make_cache(block_size: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(
        num_layers=LAYERS,
        num_blocks=BLOCKS,
        num_kv_heads=KV_HEADS,
        block_size=block_size,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@given(st.integers(1, 8), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_soft_prompt_lies_in_its_blocks_and_touches_no_other(block_size: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 3 * block_size))
    blocks = data.draw(st.permutations(range(BLOCKS)))[: -(-length // block_size)]
    keys, values = torch.randn(2, LAYERS, length, KV_HEADS, HEAD_DIM)
    cache = make_cache(block_size, torch.bfloat16)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(7.0)

    cache.write(blocks, cache.stage(keys, values))

    for held, given_ in ((cache.keys, keys), (cache.values, values)):
        for layer in range(LAYERS):
            for position in range(length):
                found = held[layer][blocks[position // block_size], :, position % block_size]
                assert torch.equal(found, given_[layer, position].bfloat16())
            others = [block for block in range(BLOCKS) if block not in blocks]
            assert (held[layer][others] == 7.0).all()


def test_copies_whole_blocks_in_every_layer() -> None:
    cache = make_cache(block_size=4)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]

    cache.copy_blocks([(2, 5), (0, 1)])

    for was, now in zip(before, (*cache.keys, *cache.values), strict=True):
        was[5], was[1] = was[2].clone(), was[0].clone()
        assert torch.equal(was, now)


def test_what_nobody_has_written_is_zero() -> None:
    cache = make_cache(block_size=16)
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))
    assert cache.bytes_per_block == 2 * LAYERS * KV_HEADS * 16 * HEAD_DIM * 4
