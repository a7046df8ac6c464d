"""The weights of a GGUF file as they are: rows of blocks, for kernels that compute with these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softbatch.scheduler.model.cpu import ops
from softbatch.scheduler.model.cpu.formats import BlockKind
from softbatch.scheduler.model.gguf_tensors import GgufTensors
from softbatch.scheduler.model.model_error import ModelError

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"  # without the second, the first is the head too
_ROWS_AT_ONCE = 8192  # so that no matrix lies in memory in float32 too


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight matrix: `data` is uint8 [outputs, bytes of a row]."""

    data: torch.Tensor
    kind: BlockKind


class GgufWeights:
    """The blocks of a model's products."""

    def __init__(self, blocks: Mapping[int, Blocks]) -> None:
        """By the identity of the parameter that each is the origin of."""
        self._blocks = dict(blocks)

    def of(self, linear: Any) -> Blocks:
        return self._blocks[id(linear.weight)]

    @property
    def kinds(self) -> str:
        return ", ".join(sorted({str(blocks.kind) for blocks in self._blocks.values()}))


def read_blocks(path: Path, model: Any, linears: Iterable[Any]) -> GgufWeights:
    """Those of `linears`, whose weights must be what became of them in bfloat16; a model in float32 gets their exact
    values. Raises ModelError where the file has something else than blocks that the kernels know."""
    file = GgufTensors(path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    origins = _origins(file, model)
    found: dict[int, Blocks] = {}
    for linear in linears:
        weight = linear.weight
        if id(weight) not in found:
            found[id(weight)] = _blocks_of(file, origins, names[id(weight)], model.config)
            _take_values(weight, found[id(weight)], names[id(weight)])
    embedding = model.get_input_embeddings().weight
    if embedding.dtype == torch.float32 and id(embedding) not in found:
        try:
            blocks = _blocks_of(file, origins, names[id(embedding)], model.config)
        except ModelError:
            return GgufWeights(found)  # it is no product, and stays as it was converted
        _take_values(embedding, blocks, names[id(embedding)])
    return GgufWeights(found)


def refuse_other_kinds(path: Path) -> None:
    """By the file's header alone, for a model whose matrices are products, but for the embedding. Raises ModelError."""
    kinds = GgufTensors(path).kinds()
    for name, (kind, number) in kinds.items():
        if name != _EMBEDDING or _HEAD not in kinds:
            _check_kind(name, kind, number)


def _check_kind(name: str, kind: str, number: int) -> None:
    if number not in {each.value for each in BlockKind}:
        known = ", ".join(map(str, BlockKind))
        raise ModelError(f"its tensor {name} is {kind}, and the kernels compute with {known}")


def _origins(file: GgufTensors, model: Any) -> dict[str, str]:
    """The tensors of the file by the names of the parameters that transformers makes of them."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    named = get_gguf_hf_weights_map(model, _processor(file, model.config))
    return {parameter: tensor for tensor, parameter in named.items()}


def _processor(file: GgufTensors, config: Any) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())


def _blocks_of(file: GgufTensors, origins: Mapping[str, str], parameter: str, config: Any) -> Blocks:
    import numpy as np

    name = origins.get(parameter, "")
    found = file.rows(name)
    if found is None:
        raise ModelError(f"the file has no tensor for {parameter}")
    kind, number, rows = found
    _check_kind(name, kind, number)
    # transformers orders the rows of some matrices anew: what it does to their numbers it does to the rows.
    order = np.arange(rows.shape[0])
    moved = _processor(file, config).process(order[:, None], name=name).weights.reshape(-1)
    if not np.array_equal(moved, order):
        rows = rows[moved]
    return Blocks(torch.from_numpy(rows), BlockKind(number))


def _take_values(weight: torch.Tensor, blocks: Blocks, name: str) -> None:
    """Raises ModelError if a weight is not what its blocks say, rounded to bfloat16."""
    for first, values in _values(blocks):
        own = weight.data[first : first + values.shape[0]]
        if own.shape != values.shape or not torch.equal(own.bfloat16(), values.bfloat16()):
            raise ModelError(f"{name} is not what the file's blocks say")
        if weight.dtype == torch.float32:
            own.copy_(values)


def _values(blocks: Blocks) -> Iterator[tuple[int, torch.Tensor]]:
    for first in range(0, blocks.data.shape[0], _ROWS_AT_ONCE):
        yield first, ops.dequantize_blocks(blocks.data[first : first + _ROWS_AT_ONCE], blocks.kind)
