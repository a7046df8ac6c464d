"""The operations between the matrix products of a decoder layer: one kernel each, where transformers runs several.

Values are rounded to the model's dtype in the same places as in transformers, so that the numbers are the same.
"""

# mypy: ignore-errors
# (mypy does not know Triton's language: arguments have no types before a launch.)

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(
    hidden, delta, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """One program per token: hidden += delta, in place; out = hidden / its root mean square · weight."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < SIZE
    x = tl.load(hidden + token * SIZE + d, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta + token * SIZE + d, mask=mask, other=0.0).to(tl.float32)
        x = x.to(hidden.dtype.element_ty)
        tl.store(hidden + token * SIZE + d, x, mask=mask)
        x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    x = x.to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * SIZE + d, (x * w).to(out.dtype.element_ty), mask=mask)


@triton.jit
def silu_and_multiply(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token and BLOCK columns: silu(gate) · up, of rows that hold gate and up side by side."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < SIZE
    gate = tl.load(gate_up + token * 2 * SIZE + d, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + d, mask=mask, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * SIZE + d, (active * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotate_and_write(
    qkv,
    cos,
    sin,
    query_norm,
    key_norm,
    eps,
    query,
    key_cache,
    value_cache,
    slot_mapping,
    block_stride,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """One program per token, whose row of qkv holds all heads: rotate the queries, write rotated keys and plain values
    to the cache. With NORM, queries and keys are normalised first."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    row = qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = d < HALF
    cosine = tl.load(cos + token * HEAD_DIM + d, mask=in_half, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * HEAD_DIM + d, mask=in_half, other=0.0).to(tl.float32)

    head = tl.arange(0, BLOCK_Q)[:, None]
    mask = (head < HEADS) & in_half
    first, second = _turned(row + head * HEAD_DIM + d, query_norm, d, mask, cosine, sine, eps, HEAD_DIM, NORM)
    target = query + (token * HEADS + head) * HEAD_DIM + d
    tl.store(target, first.to(query.dtype.element_ty), mask=mask)
    tl.store(target + HALF, second.to(query.dtype.element_ty), mask=mask)

    head = tl.arange(0, BLOCK_KV)[:, None]
    mask = (head < KV_HEADS) & in_half
    keys = row + HEADS * HEAD_DIM + head * HEAD_DIM + d
    place = (slot // BLOCK_SIZE) * block_stride + head * head_stride + (slot % BLOCK_SIZE) * HEAD_DIM + d
    first, second = _turned(keys, key_norm, d, mask, cosine, sine, eps, HEAD_DIM, NORM)
    tl.store(key_cache + place, first.to(key_cache.dtype.element_ty), mask=mask)
    tl.store(key_cache + place + HALF, second.to(key_cache.dtype.element_ty), mask=mask)
    values = keys + KV_HEADS * HEAD_DIM
    tl.store(value_cache + place, tl.load(values, mask=mask, other=0.0), mask=mask)
    tl.store(value_cache + place + HALF, tl.load(values + HALF, mask=mask, other=0.0), mask=mask)


@triton.jit
def _turned(source, weight, d, mask, cosine, sine, eps, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Both halves of each head, rotated by the position's angles, in float32."""
    HALF: tl.constexpr = HEAD_DIM // 2
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        dtype = source.dtype.element_ty
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM + eps)[:, None]
        first = (first * scale).to(dtype).to(tl.float32)
        second = (second * scale).to(dtype).to(tl.float32)
        in_half = d < HALF
        first = (first * tl.load(weight + d, mask=in_half, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        second = (second * tl.load(weight + HALF + d, mask=in_half, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine
