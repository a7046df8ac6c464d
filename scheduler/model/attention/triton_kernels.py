"""Paged attention as Triton kernels: what one program computes. `triton.py` launches them over the plan of `tiles.py`.

All kernels run in Triton's interpreter on a CPU too, so that tests need no GPU.
"""

# mypy: ignore-errors
# (mypy does not know Triton's language: arguments have no types before a launch.)

import triton
import triton.language as tl

TILE_FIELDS = tl.constexpr(4)  # sequence (-1: nothing to do), first query row, first key, end of keys
LOG2_E = tl.constexpr(1.4426950408889634)
MERGE_FIELDS = tl.constexpr(4)  # output row, first tile, number of tiles, query row within the tile


@triton.jit
def write_cache(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    block_stride,
    head_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per token: write the keys and values of all heads to the token's slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    head = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (d < HEAD_DIM)
    target = (slot // BLOCK_SIZE) * block_stride + head * head_stride + (slot % BLOCK_SIZE) * HEAD_DIM + d
    new_key = tl.load(key + token * key_stride + head * key_head_stride + d, mask=mask, other=0.0)
    tl.store(key_cache + target, new_key, mask=mask)
    new_value = tl.load(value + token * value_stride + head * value_head_stride + d, mask=mask, other=0.0)
    tl.store(value_cache + target, new_value, mask=mask)


# The width of the block table changes from step to step, so that a kernel must not be specialised for one.
@triton.jit(do_not_specialize=["table_stride"])
def attend(
    query,
    out,
    key_cache,
    value_cache,
    block_table,
    query_start,
    context_len,
    tiles,
    part_sums,  # float32 [tiles, kv_heads, BLOCK_M, HEAD_DIM]: weighted values, not yet divided
    part_maxima,  # float32 [tiles, kv_heads, BLOCK_M]
    part_weights,  # float32 [tiles, kv_heads, BLOCK_M]
    sinks,  # [heads]
    scale,  # times log2(e): weights are powers of two
    query_stride,
    query_head_stride,
    table_stride,
    block_stride,
    head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a row sees; 0: all
    SOFTCAP: tl.constexpr,  # times log2(e); 0: none
    SINKS: tl.constexpr,
):
    """One program per tile and KV head: attention of the tile's query rows, for all heads of the group, over its keys.

    Row m of BLOCK_M is query row m // GROUP, head m % GROUP. With SPLIT, a tile that covers only part of its
    sequence's keys leaves its sums to `merge`.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tiles + tile * TILE_FIELDS).to(tl.int64)
    if sequence < 0:
        return
    first_row = tl.load(tiles + tile * TILE_FIELDS + 1)
    key_start = tl.load(tiles + tile * TILE_FIELDS + 2)
    key_end = tl.load(tiles + tile * TILE_FIELDS + 3)
    begin = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - begin
    context = tl.load(context_len + sequence)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = first_row + m // GROUP
    head = kv_head * GROUP + m % GROUP
    present_row = (m < BLOCK_M // GROUP * GROUP) & (row < count)
    position = context - count + row  # the last key that the row sees
    token = (begin + row).to(tl.int64)
    row_mask = present_row[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(
        query + token[:, None] * query_stride + head[:, None] * query_head_stride + d[None, :],
        mask=row_mask,
        other=0.0,
    )

    keys = key_cache + kv_head.to(tl.int64) * head_stride
    values = value_cache + kv_head.to(tl.int64) * head_stride
    table = block_table + sequence * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    seen_by_all = tl.minimum(key_end, context - count + first_row + 1)
    if WINDOW > 0:
        masked_start = key_start + tl.maximum(seen_by_all - WINDOW - key_start, 0) // BLOCK_N * BLOCK_N
    else:
        # Nearly all keys are seen by every row of the tile. These need no mask.
        masked_start = key_start + tl.maximum(seen_by_all - key_start, 0) // BLOCK_N * BLOCK_N
        acc, total, maximum = _walk(
            acc, total, maximum, q, keys, values, table, key_start, masked_start, key_end, position, scale,
            block_stride, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, False, WINDOW, SOFTCAP,
        )  # fmt: skip
    acc, total, maximum = _walk(
        acc, total, maximum, q, keys, values, table, masked_start, key_end, key_end, position, scale, block_stride,
        HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, True, WINDOW, SOFTCAP,
    )  # fmt: skip

    is_whole = (key_start == 0) & (key_end == context)
    if SPLIT and not is_whole:
        part = (tile.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_M + m
        tl.store(part_sums + part[:, None] * HEAD_DIM + d[None, :], acc, mask=row_mask)
        tl.store(part_maxima + part, maximum, mask=present_row)
        tl.store(part_weights + part, total, mask=present_row)
    else:
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
            highest = tl.maximum(maximum, sink)
            acc = acc * tl.exp2(maximum - highest)[:, None]
            total = total * tl.exp2(maximum - highest) + tl.exp2(sink - highest)
        target = (token[:, None] * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + d[None, :]
        tl.store(out + target, (acc / total[:, None]).to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def _walk(
    acc,
    total,
    maximum,
    q,
    keys,
    values,
    table,
    start,
    end,
    key_end,
    position,
    scale,
    block_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Online softmax over keys start … end−1. MASKED if some row does not see all of them, or if they end in a tile.

    Slots past `key_end` may hold NaN, and 0 · NaN is NaN. So they are not loaded at all.
    """
    d = tl.arange(0, BLOCK_D)
    for tile_start in range(start, end, BLOCK_N):
        n = tile_start + tl.arange(0, BLOCK_N)
        if MASKED:
            present = n < key_end
            block = tl.load(table + n // BLOCK_SIZE, mask=present, other=0)
        else:
            block = tl.load(table + n // BLOCK_SIZE)
        slot = block.to(tl.int64) * block_stride + (n % BLOCK_SIZE) * HEAD_DIM
        if MASKED:
            k = tl.load(keys + slot[None, :] + d[:, None], mask=present[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        elif BLOCK_D == HEAD_DIM:
            k = tl.load(keys + slot[None, :] + d[:, None])
        else:
            k = tl.load(keys + slot[None, :] + d[:, None], mask=(d < HEAD_DIM)[:, None], other=0.0)
        scores = _capped(tl.dot(q, k, input_precision="ieee") * scale, SOFTCAP)
        if MASKED:
            scores = tl.where(present[None, :] & _sees(position, n, WINDOW), scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # If a row has seen no key yet, −inf − −inf would be NaN.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        maximum = new_maximum
        if MASKED:
            v = tl.load(values + slot[:, None] + d[None, :], mask=present[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        elif BLOCK_D == HEAD_DIM:
            v = tl.load(values + slot[:, None] + d[None, :])
        else:
            v = tl.load(values + slot[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, maximum


@triton.jit
def _capped(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(scores / SOFTCAP)."""
    if SOFTCAP > 0:
        scores = SOFTCAP - 2 * SOFTCAP / (tl.exp2(scores * (2 * LOG2_E / SOFTCAP)) + 1)
    return scores


@triton.jit
def _sees(position, n, WINDOW: tl.constexpr):
    """Which keys each row sees, [rows, keys]."""
    seen = n[None, :] <= position[:, None]
    if WINDOW > 0:
        seen &= n[None, :] > position[:, None] - WINDOW
    return seen


@triton.jit
def merge(
    out,
    merges,
    part_sums,
    part_maxima,
    part_weights,
    sinks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One program per query row and head: merge the parts that `attend` left, as if it had walked all keys at once."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    parts = tl.load(merges + index * MERGE_FIELDS + 2)
    if parts <= 1:
        return
    token = tl.load(merges + index * MERGE_FIELDS).to(tl.int64)
    first = tl.load(merges + index * MERGE_FIELDS + 1).to(tl.int64)
    row = tl.load(merges + index * MERGE_FIELDS + 3)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = 0.0
    maximum = float("-inf")
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        present = p < parts
        part = ((first + p) * KV_HEADS + head // GROUP) * BLOCK_M + row * GROUP + head % GROUP
        maxima = tl.load(part_maxima + part, mask=present, other=float("-inf"))
        sums = tl.load(
            part_sums + part[:, None] * HEAD_DIM + d[None, :],
            mask=present[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = tl.exp2(maximum - base)
        weights = tl.exp2(maxima - base)
        acc = acc * shrink + tl.sum(sums * weights[:, None], 0)
        total = total * shrink + tl.sum(tl.load(part_weights + part, mask=present, other=0.0) * weights, 0)
        maximum = new_maximum
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        highest = tl.maximum(maximum, sink)
        acc = acc * tl.exp2(maximum - highest)
        total = total * tl.exp2(maximum - highest) + tl.exp2(sink - highest)
    target = (token * (KV_HEADS * GROUP) + head) * HEAD_DIM + d
    tl.store(out + target, (acc / total).to(out.dtype.element_ty), mask=d < HEAD_DIM)
