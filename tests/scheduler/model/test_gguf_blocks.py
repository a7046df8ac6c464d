"""Products with GGUF's blocks as they are: their values, and how far products of them are off."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
import torch

from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import BlockKind
from tests.support.gguf_blocks import block_size, exact, random_blocks
from tests.support.models import in_threads

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
GROUP = 32  # inputs that share a scale of activations
KINDS = pytest.mark.parametrize("kind", BlockKind, ids=str)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    assert build_kernels()


def rows_of(count: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Activations with a few outliers, as models have them, and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator)
    x[:, ::37] *= 40
    x[0, :GROUP] = 0
    return x


def product(x: torch.Tensor, *matrices: tuple[np.ndarray, BlockKind]) -> torch.Tensor:
    return ops.multiply_blocks(x, [(torch.from_numpy(data), kind) for data, kind in matrices])


def error_bound(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """An activation is off by half a 32639th of the largest of its group; the rest are sums in float32, of numbers that
    are no larger than the largest weight of a group plus its minimum."""
    of_groups = x.view(x.shape[0], -1, GROUP)
    steps = (of_groups.abs().amax(-1) / 32639).repeat_interleave(GROUP, -1)
    largest = weights.view(weights.shape[0], -1, GROUP).abs().amax(-1).repeat_interleave(GROUP, -1)
    return 0.501 * steps @ weights.abs().T + 1e-6 * x.abs() @ largest.T + 1e-30


def test_kinds_have_the_same_numbers_everywhere() -> None:
    assert {str(kind): kind.value for kind in BlockKind} == ops.block_kinds()
    assert all(gguf.GGMLQuantizationType[kind.name].value == kind.value for kind in BlockKind)


@KINDS
def test_values_are_those_of_the_reference_bit_for_bit(kind: BlockKind) -> None:
    blocks = random_blocks(kind, 70, 3 * 256)
    found = ops.dequantize_blocks(torch.from_numpy(blocks), kind)
    assert np.array_equal(found.numpy().view(np.uint32), exact(blocks, kind).view(np.uint32))


@KINDS
@pytest.mark.parametrize(("outputs", "blocks"), [(1, 1), (31, 2), (33, 3), (70, 5)])
def test_products_are_near_the_exact_ones(kind: BlockKind, outputs: int, blocks: int) -> None:
    """For 1 to 70 rows, within the bound; the same bit for bit whoever shares the step; nearer than in bfloat16."""
    inputs = blocks * block_size(kind)[0]
    data = random_blocks(kind, outputs, inputs)
    weights = torch.from_numpy(exact(data, kind))
    x = rows_of(70, inputs)
    expected = (x.double() @ weights.double().T).float()
    bound = error_bound(x, weights)
    whole = product(x, (data, kind))
    assert ((whole - expected).abs() <= bound).all()
    for rows in (*range(1, 35), 63, 64, 65):  # on both sides of a tile
        assert torch.equal(product(x[:rows], (data, kind)), whole[:rows])
    assert torch.equal(product(x[32:], (data, kind)), whole[32:])
    rounded = x.bfloat16().float() @ weights.bfloat16().float().T
    assert (whole - expected).norm() < (rounded - expected).norm() / 5


def test_matrices_of_several_kinds_share_a_product() -> None:
    """Panels that hold outputs of two kinds among them."""
    sizes = zip(BlockKind, (40, 9, 64, 1, 33, 30, 7, 20, 45), strict=True)
    matrices = [(random_blocks(kind, outputs, 512), kind) for kind, outputs in sizes]
    x = rows_of(20, 512)
    for threads in (1, 3):
        with in_threads(threads):
            found = product(x, *matrices)
            alone = torch.cat([product(x, each) for each in matrices], dim=1)
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-4)
            assert torch.equal(product(x[3:4], *matrices), found[3:4])


@KINDS
def test_many_rows(kind: BlockKind) -> None:
    """Several tiles of them."""
    data = random_blocks(kind, 45, 512)
    x = rows_of(150, 512)
    whole = product(x, (data, kind))
    assert torch.equal(torch.cat([product(x[:7], (data, kind)), product(x[7:], (data, kind))]), whole)
    with in_threads(3):
        assert torch.equal(product(x, (data, kind)), whole)


@KINDS
def test_what_is_not_finite_stays_in_its_row(kind: BlockKind) -> None:
    data = random_blocks(kind, 33, 256)
    x = rows_of(3, 256)
    x[1, 40] = float("nan")
    x[2, 200] = float("inf")
    found = product(x, (data, kind))
    assert torch.equal(found[:1], product(x[:1], (data, kind)))
    assert found[1:].isnan().all()


def test_other_bytes_are_refused() -> None:
    x = rows_of(2, 64)
    data = torch.from_numpy(random_blocks(BlockKind.Q8_0, 4, 64))
    with pytest.raises(RuntimeError, match="rows of Q5_0 must be contiguous bytes, a multiple of 22"):
        ops.multiply_blocks(x, [(data, BlockKind.Q5_0)])
    with pytest.raises(RuntimeError, match=r"a weight must be \[4, 64\], not \[4, 32\]"):
        ops.multiply_blocks(x, [(data[:, :34].contiguous(), BlockKind.Q8_0)])
    with pytest.raises(RuntimeError, match="contiguous bytes"):
        ops.dequantize_blocks(data[:, ::2], BlockKind.Q8_0)
