"""A step in flight: launched, but its result has not been read. The host may plan the next step meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from softbatch.scheduler.model.sampling.sampler import Samples
from softbatch.scheduler.model.staging import ToHost, small_tensor
from softbatch.scheduler.protocol import PromptLogprobs
from softbatch.scheduler.step import StepResult

# Rows whose log-probabilities are computed at a time, so that no second table of all the logits is made.
_ROWS = 64


class StepScores:
    """Log-probabilities of given tokens and of the `top` best ones, which are being copied from the device.

    `logits` [n, vocab] predict the n tokens of `following`."""

    def __init__(self, logits: torch.Tensor, following: Sequence[int], top: int) -> None:
        targets = small_tensor(following, logits.device, torch.int64)[:, None]
        self._top = min(top, logits.shape[-1])
        parts = []
        for rows, given in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
            table = torch.log_softmax(rows.float(), dim=-1)
            chosen = table.gather(1, given)
            ranks = (table > chosen).sum(-1, keepdim=True) + 1
            best = table.topk(self._top, dim=-1)
            parts += [chosen, ranks, best.indices, best.values]
        self._numbers = ToHost(parts)

    def read(self) -> list[PromptLogprobs]:
        found = iter(self._numbers.read())
        scores = []
        for chosen, ranks, ids, values in zip(found, found, found, found, strict=True):
            for row, (logprob, rank) in enumerate(zip(chosen, ranks, strict=True)):
                best = slice(row * self._top, (row + 1) * self._top)
                scores.append(PromptLogprobs(logprob, [int(id) for id in ids[best]], values[best], int(rank)))
        return scores


@dataclass(eq=False)
class InFlightStep:
    """The pending result of a step. Its sampled tokens are available on the device at once."""

    errors: dict[str, str] = field(default_factory=dict)
    prefill_errors: dict[str, str] = field(default_factory=dict)
    scores: dict[str, StepScores] = field(default_factory=dict)
    state_sums: dict[str, ToHost] = field(default_factory=dict)
    _samples: list[tuple[list[str], Samples]] = field(default_factory=list)
    _tokens: list[torch.Tensor] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add_samples(self, request_ids: list[str], samples: Samples) -> None:
        self._places |= dict(
            zip(request_ids, range(len(self._places), len(self._places) + len(request_ids)), strict=True)
        )
        self._samples.append((request_ids, samples))
        self._tokens.append(samples.tokens)

    def tokens_of(self, request_ids: Sequence[str]) -> torch.Tensor | None:
        """The tokens sampled for these requests, int64 [n] on the device. None if all requests failed; the token of a
        single failed request is arbitrary."""
        if not self._tokens:
            return None
        if len(self._tokens) > 1:
            self._tokens = [torch.cat(self._tokens)]
        tokens = self._tokens[0]
        places = [self._places.get(request_id, 0) for request_id in request_ids]
        return tokens[small_tensor(places, tokens.device, torch.int64)]

    def result(self) -> StepResult:
        """Wait for the step to end and read its result. Called once."""
        tokens, logprobs, scores, errors, resampled = {}, {}, {}, dict(self.errors), set()
        for request_ids, samples in self._samples:
            for request_id, sample in zip(request_ids, samples.read(), strict=True):
                if sample.error is not None:
                    errors[request_id] = sample.error
                    continue
                tokens[request_id] = sample.token_id
                if sample.logprobs is not None:
                    logprobs[request_id] = sample.logprobs
                if sample.resampled:
                    resampled.add(request_id)
        for request_id, found in self.scores.items():
            values = found.read()
            if all(math.isfinite(score.logprob) for score in values):
                scores[request_id] = values
            else:
                errors[request_id] = "the model's logits are not finite"
        sums = {}
        for request_id, numbers in self.state_sums.items():
            (sums[request_id],) = numbers.read()
            if not all(map(math.isfinite, sums[request_id])):
                errors[request_id] = "the model's hidden states are not finite"
        self._samples = []  # probabilities of whole vocabularies; the tokens may still be asked for
        return StepResult(tokens, logprobs, scores, errors, self.prefill_errors, frozenset(resampled), sums)
