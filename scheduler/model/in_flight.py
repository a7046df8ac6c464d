"""A step in flight: launched, but its result has not been read. The host may plan the next step meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from softbatch.scheduler.model.sampling.sampler import Samples
from softbatch.scheduler.model.staging import ToHost, small_tensor
from softbatch.scheduler.step import StepResult


class StepScores:
    """Log-probabilities of given tokens, which are being copied from the device.

    `logits` [n, vocab] predict the n tokens of `following`."""

    def __init__(self, logits: torch.Tensor, following: Sequence[int]) -> None:
        targets = small_tensor(following, logits.device, torch.int64)
        table = torch.log_softmax(logits.float(), dim=-1)
        self._numbers = ToHost([table.gather(1, targets[:, None])])

    def read(self) -> list[float]:
        return self._numbers.read()[0]


@dataclass(eq=False)
class InFlightStep:
    """The pending result of a step. Its sampled tokens are available on the device at once."""

    errors: dict[str, str] = field(default_factory=dict)
    prefill_errors: dict[str, str] = field(default_factory=dict)
    scores: dict[str, StepScores] = field(default_factory=dict)
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
            if all(map(math.isfinite, values)):
                scores[request_id] = values
            else:
                errors[request_id] = "the model's logits are not finite"
        self._samples = []  # probabilities of whole vocabularies; the tokens may still be asked for
        return StepResult(tokens, logprobs, scores, errors, self.prefill_errors, frozenset(resampled))
