"""What is true of the running batch between two steps, whatever happened before."""

from __future__ import annotations

from collections.abc import Iterable

from softbatch.scheduler.policy import precedence
from softbatch.scheduler.scheduler_config import SchedulerConfig
from softbatch.scheduler.sequence import Sequence
from softbatch.scheduler.soft_prompt_cache import ResidentSoftPrompt


def check_batch(running: list[Sequence], prompts: Iterable[ResidentSoftPrompt], config: SchedulerConfig) -> None:
    """Raise AssertionError for too many sequences, a wrong order, positions without blocks, or users counted wrong."""
    if len(running) > config.max_batch_size:
        raise AssertionError("more sequences run than there are slots")
    if running != sorted(running, key=precedence):
        raise AssertionError("the running batch is out of order")
    for sequence in running:
        if len(sequence.block_table) * config.block_size < sequence.num_computed:
            raise AssertionError(f"{sequence.request_id} has computed past its blocks")
    for prompt in prompts:
        users = sum(1 for s in running if s.soft_prompt and s.soft_prompt.sha256 == prompt.ref.sha256)
        if users != prompt.users:
            raise AssertionError(f"soft prompt {prompt.ref.sha256} counts {prompt.users} users, has {users}")
