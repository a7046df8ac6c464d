"""Batched sampling. The token of a sequence depends only on its own logits, parameters, seed and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from softbatch.scheduler.model.sampling.adjustments import FEW, SampleInput, adjusted, few_allowed, needs_history
from softbatch.scheduler.model.staging import ToHost, small_tensor
from softbatch.scheduler.protocol import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
MAX_LOGPROBS = 20
# Filters look at this many of the most probable tokens. The rare row that needs more is sorted completely.
HEAD = 1024


@dataclass(frozen=True)
class Sample:
    """`error` is set if the row's logits are not finite; then no token was sampled. `resampled` is set if the token is
    not the one on the device, which the next step has started from."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    resampled: bool = False


class Samples(Protocol):
    """Samples that are being copied from the device. `tokens`, int64 [rows], are available there at once."""

    tokens: torch.Tensor

    def read(self) -> list[Sample]:
        """Wait for the copy."""
        ...


def sample(logits: torch.Tensor, inputs: Sequence[SampleInput]) -> Samples:
    """Choose one token per row of `logits` [rows, vocab].

    Order: masks, biases, penalties, barred tokens, temperature, top-k, top-p within what top-k left, min-p relative to
    the most probable token.
    Log-probabilities are those of the model, before all of these. All is read back from the device at once.
    """
    logits = logits.float()
    raw = logits
    few = _few_by_row(inputs, logits)
    logits = adjusted(logits, inputs, few)
    if logits.device.type == "cpu" and all(_is_plain(row.params) for row in inputs):
        return _GreedyOnCpu(logits.numpy(), few)
    tokens = _most_probable(logits, few)
    finite = torch.isfinite(logits.gather(1, tokens[:, None])[:, 0])  # NaN and infinity count as the most probable
    drawn = _Draw.of(logits, inputs, few)
    if drawn is not None:
        tokens = tokens.index_copy(0, drawn.at, drawn.tokens)
    return _OnDevice(tokens, finite, drawn, _LogprobTable.of(raw, inputs))


def own_choice(logits: torch.Tensor, params: SamplingParams) -> int | None:
    """The token that a greedy row [vocab] has unless that is forbidden. None if it is not known at once: of a row that
    is not greedy or has adjustments, and on a GPU, which would have to be waited for."""
    is_known = logits.device.type == "cpu" and _is_greedy(params) and not params.logit_bias
    return None if needs_history(params) or not is_known else int(logits.float().numpy().argmax())


def _few_by_row(inputs: Sequence[SampleInput], logits: torch.Tensor) -> dict[int, np.ndarray]:
    """The tokens of rows whose masks allow so few that the others need not be looked at. None on a GPU."""
    if logits.device.type != "cpu":
        return {}
    found = ((index, few_allowed(row.mask, logits.shape[-1])) for index, row in enumerate(inputs))
    return {index: tokens for index, tokens in found if tokens is not None}


class _OnDevice:
    """`Samples` for all parameters."""

    def __init__(
        self, tokens: torch.Tensor, finite: torch.Tensor, drawn: _Draw | None, table: _LogprobTable | None
    ) -> None:
        self.tokens = tokens
        self._drawn = drawn
        self._table = table
        needs_whole = drawn.needs_whole if drawn is not None else finite[:0]
        self._numbers = ToHost([tokens, finite, needs_whole, *(table.rows(tokens) if table is not None else [])])

    def read(self) -> list[Sample]:
        chosen, finite, needs_whole, *found = self._numbers.read()
        tokens = [int(token) for token in chosen]
        looked_at = [index for index, needed in enumerate(needs_whole) if needed]
        again = self._drawn.from_whole(looked_at) if self._drawn is not None else {}
        resampled = {row: token for row, token in again.items() if token != tokens[row]}
        logprobs = self._table.by_row(found, resampled) if self._table is not None else {}
        return [
            _sample_or_error(resampled.get(row, token), bool(finite[row]), logprobs.get(row), row in resampled)
            for row, token in enumerate(tokens)
        ]


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW


def _is_plain(params: SamplingParams) -> bool:
    return params.logprobs is None and _is_greedy(params)


class _GreedyOnCpu:
    """`Samples` for greedy rows on a CPU. numpy needs fewer calls than torch, and each call costs cache misses."""

    def __init__(self, logits: np.ndarray, few: Mapping[int, np.ndarray]) -> None:
        tokens = _most_probable_on_cpu(logits, few)
        finite = np.isfinite(logits[np.arange(len(tokens)), tokens])
        self.tokens = torch.from_numpy(tokens)
        self._samples = [_sample_or_error(*row) for row in zip(tokens.tolist(), finite.tolist(), strict=True)]

    def read(self) -> list[Sample]:
        return self._samples


def _sample_or_error(
    token_id: int, is_finite: bool, logprobs: TokenLogprobs | None = None, resampled: bool = False
) -> Sample:
    if not is_finite:
        return Sample(-1, error="the model's logits are not finite")
    return Sample(token_id, logprobs, resampled=resampled)


def _most_probable(logits: torch.Tensor, few: Mapping[int, np.ndarray]) -> torch.Tensor:
    """Arg-max per row, on CPUs by numpy, whose search is vectorised."""
    if logits.device.type == "cpu":
        return torch.from_numpy(_most_probable_on_cpu(logits.numpy(), few))
    return logits.argmax(dim=-1)


def _most_probable_on_cpu(logits: np.ndarray, few: Mapping[int, np.ndarray]) -> np.ndarray:
    if not few:
        return np.asarray(logits.argmax(axis=-1))
    return np.array([few[at][row[few[at]].argmax()] if at in few else row.argmax() for at, row in enumerate(logits)])


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1) from seed and position alone, by Philox (Salmon et al. 2011), which has no state."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


@dataclass(frozen=True)
class _Draw:
    """Inverse-CDF sampling with one uniform number per row. All filters are cuts in the sorted distribution."""

    at: torch.Tensor  # int64 [n], rows of the batch: those that are not greedy
    tokens: torch.Tensor  # int64 [n]
    # Of those with filters for which the head may not be enough, f in all; kept until the tokens are read:
    rows: list[int]
    params: list[SamplingParams]
    probs: torch.Tensor  # [f, vocab]
    numbers: torch.Tensor  # [f]
    needs_whole: torch.Tensor  # bool [f]: the filters keep all of the head, and perhaps more behind it

    @classmethod
    def of(cls, logits: torch.Tensor, inputs: Sequence[SampleInput], few: Mapping[int, np.ndarray]) -> _Draw | None:
        rows = [i for i, row in enumerate(inputs) if not _is_greedy(row.params)]
        if not rows:
            return None
        of_few = [i for i in rows if i in few]
        drawn = cls._of_rows(logits, inputs, [i for i in rows if i not in few])
        if not of_few:
            return drawn
        at = torch.tensor(of_few)
        tokens = _draw_of_few(logits, [inputs[i] for i in of_few], at, [few[i] for i in of_few])
        return replace(drawn, at=torch.cat([drawn.at, at]), tokens=torch.cat([drawn.tokens, tokens]))

    @classmethod
    def _of_rows(cls, logits: torch.Tensor, inputs: Sequence[SampleInput], rows: list[int]) -> _Draw:
        device = logits.device
        params = [inputs[i].params for i in rows]
        at = small_tensor(rows, device, torch.int64)
        temperature = small_tensor([p.temperature for p in params], device, torch.float32)
        probs = torch.softmax(logits[at] / temperature[:, None], dim=-1)
        uniforms = [uniform(inputs[i].params.seed, inputs[i].position) for i in rows]
        numbers = small_tensor(uniforms, device, torch.float32)
        tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
        filtered = [i for i, p in enumerate(params) if _filters(p)]
        plain = [i for i, p in enumerate(params) if not _filters(p)]
        if plain:
            mine = small_tensor(plain, device, torch.int64)
            tokens[mine] = _invert(probs[mine], numbers[mine])
        if not filtered:
            return cls(at, tokens, [], [], probs[:0].clone(), numbers[:0], numbers[:0].bool())
        mine = small_tensor(filtered, device, torch.int64)
        of_filtered, number, limits = probs[mine], numbers[mine], [params[i] for i in filtered]
        head, ids = of_filtered.topk(min(HEAD, probs.shape[-1]), dim=-1)
        chosen, kept = _invert_cut(head, number, limits)
        tokens[mine] = ids.gather(1, chosen[:, None])[:, 0]
        needs_whole = (kept == head.shape[-1]) & (head.shape[-1] < probs.shape[-1])
        return cls(at, tokens, [rows[i] for i in filtered], limits, of_filtered, number, needs_whole)

    def from_whole(self, wanted: Sequence[int]) -> dict[int, int]:
        """The tokens of those of the f rows for which the head was not enough, by row of the batch. They are sorted on
        the host, which has the memory for it."""
        found = {}
        for index in wanted:
            whole, order = self.probs[index].cpu().sort(descending=True)
            chosen, _ = _invert_cut(whole[None], self.numbers[index : index + 1].cpu(), [self.params[index]])
            found[self.rows[index]] = int(order[chosen[0]])
        return found


def _draw_of_few(
    logits: torch.Tensor, inputs: Sequence[SampleInput], at: torch.Tensor, allowed: Sequence[np.ndarray]
) -> torch.Tensor:
    """As `_Draw.of`, of rows `at` whose masks allow so few tokens that the others need not be looked at."""
    # All as wide, whatever the others are: the width decides how sums are rounded.
    ids = np.zeros((len(allowed), FEW), dtype=np.int64)
    for row, tokens in zip(ids, allowed, strict=True):
        row[: len(tokens)] = tokens
    is_token = torch.arange(FEW) < torch.tensor([len(tokens) for tokens in allowed])[:, None]
    columns = torch.from_numpy(ids)
    scores = logits[at[:, None], columns].masked_fill(~is_token, -torch.inf)
    probs = torch.softmax(scores / torch.tensor([row.params.temperature for row in inputs])[:, None], dim=-1)
    numbers = torch.tensor([uniform(row.params.seed, row.position) for row in inputs], dtype=torch.float32)
    chosen = _invert(probs, numbers)
    filtered = [index for index, row in enumerate(inputs) if _filters(row.params)]
    if filtered:
        ordered, order = probs[filtered].sort(dim=-1, descending=True, stable=True)
        cut, _ = _invert_cut(ordered, numbers[filtered], [inputs[index].params for index in filtered])
        chosen[filtered] = order.gather(1, cut[:, None])[:, 0]
    return columns.gather(1, chosen[:, None])[:, 0]


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _invert_cut(
    values: torch.Tensor, numbers: torch.Tensor, params: Sequence[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of descending probabilities [rows, n]: the index drawn from the tokens that pass all filters, and
    how many pass (at least one)."""
    device, size = values.device, values.shape[-1]
    top_k = small_tensor([min(p.top_k, size) for p in params], device, torch.int64)[:, None]
    top_p = small_tensor([p.top_p for p in params], device, torch.float64)[:, None]
    min_p = small_tensor([p.min_p for p in params], device, torch.float32)[:, None]
    rank = torch.arange(size, device=device)
    kept = torch.where(top_k > 0, top_k, size)
    mass = values.double().cumsum(-1)
    total = torch.where(top_k > 0, mass.gather(1, kept - 1), 1.0)
    within = ((rank < kept) & (mass < top_p * total)).sum(-1, keepdim=True) + 1
    kept = torch.where(top_p < 1.0, torch.minimum(kept, within), kept)
    likely = ((rank < kept) & (values >= min_p * values[:, :1])).sum(-1, keepdim=True)
    kept = torch.where(min_p > 0.0, torch.minimum(kept, likely), kept).clamp(min=1)
    return _invert(values.masked_fill(rank >= kept, 0.0), numbers), kept[:, 0]


def _invert(probs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The index at which each row's cumulative probability passes its number. Never a token of probability zero."""
    mass = probs.double().cumsum(dim=-1)
    target = numbers.double() * mass[:, -1]
    index = torch.searchsorted(mass, target[:, None], right=True)[:, 0]
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)


@dataclass(frozen=True)
class _LogprobTable:
    """Log-probabilities of the rows that ask for some."""

    at: list[int]  # their rows in the batch
    counts: list[int]  # alternatives wanted by each
    table: torch.Tensor  # [wanted, vocab]
    most: int  # the same whoever asks: which of equal tokens come first may depend on it

    @classmethod
    def of(cls, logits: torch.Tensor, inputs: Sequence[SampleInput]) -> _LogprobTable | None:
        at = [i for i, row in enumerate(inputs) if row.params.logprobs is not None]
        if not at:
            return None
        table = torch.log_softmax(logits[small_tensor(at, logits.device, torch.int64)], dim=-1)
        most = min(MAX_LOGPROBS, table.shape[-1])
        counts = [min(inputs[i].params.logprobs or 0, most) for i in at]
        return cls(at, counts, table, most)

    def rows(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """The chosen tokens' log-probabilities, then ids and log-probabilities of the alternatives."""
        mine = tokens[small_tensor(self.at, tokens.device, torch.int64)]
        top = self.table.topk(self.most, dim=-1)
        return [self.table.gather(1, mine[:, None]), top.indices, top.values]

    def by_row(self, found: list[list[float]], resampled: Mapping[int, int]) -> dict[int, TokenLogprobs]:
        """The result of `rows`, after it was copied, by row of the batch. Resampled tokens are looked up."""
        chosen, ids, values = found
        result = {}
        for at, (row, count) in enumerate(zip(self.at, self.counts, strict=True)):
            mine = slice(at * self.most, at * self.most + count)
            own = float(self.table[at, resampled[row]]) if row in resampled else chosen[at]
            result[row] = TokenLogprobs(own, [int(id) for id in ids[mine]], values[mine])
        return result
