"""Whatever happens in whatever order: nobody is lost, run twice or left waiting, and no block leaks."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from softbatch.scheduler.length_rule import LengthRule
from softbatch.scheduler.protocol import BACKGROUND, AddRequest, SamplingParams, SequenceOutput
from tests.support.fake_runner import EOS, FakeRunner, make_scheduler, next_token, prompt_ref

PROMPTS = [prompt_ref(f"p{length}", length) for length in (1, 4, 7)]
# Any of them needs at most the blocks there are, and three of them more.
MOST_STEPS = 2000


def expected(token_ids: list[int], params: SamplingParams) -> list[int]:
    tokens, found = list(token_ids), []
    while len(found) < params.max_tokens:
        found.append(next_token(tokens))
        tokens.append(found[-1])
        if found[-1] == EOS and not params.ignore_eos:
            break
    return found


class EngineMachine(RuleBasedStateMachine):
    """A scheduler as its engine and its front end drive it: requests of several owners and priorities, cancellations,
    soft prompts that load, fail and are deleted, a device without memory, and engines that die."""

    @initialize(
        slots=st.integers(1, 5),
        num_blocks=st.integers(14, 30),
        extra=st.integers(0, 12),
        reuses_output=st.booleans(),
        length_rule=st.sampled_from([None, LengthRule(11), LengthRule(11, renews=True)]),
    )
    def start(
        self, slots: int, num_blocks: int, extra: int, reuses_output: bool, length_rule: LengthRule | None
    ) -> None:
        self.options = {
            "max_batch_size": slots,
            "num_blocks": num_blocks,
            "max_batch_tokens": slots + extra,
            "max_model_len": 40,
            "reuses_output": reuses_output,
            "length_rule": length_rule,
        }
        self.asked: dict[str, AddRequest] = {}
        self.received: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """A new engine knows of nothing; every request that has not ended goes on where it was."""
        self.scheduler = make_scheduler(**self.options)
        self.runner = FakeRunner(self.scheduler)
        for name in self.open():
            self.submit(name)

    def open(self) -> list[str]:
        return [name for name in self.asked if name not in self.ended]

    def submit(self, name: str) -> None:
        request, delivered = self.asked[name], self.received[name]
        again = AddRequest(
            request_id=name,
            token_ids=[*request.token_ids, *delivered],
            params=request.params,
            num_delivered=len(delivered),
            soft_prompt=request.soft_prompt,
            priority=request.priority,
            owner=request.owner,
        )
        assert self.scheduler.add(again) is None

    def take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.ended, "it has ended already"
            self.received[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.finish_reason

    @rule(
        tokens=st.lists(st.sampled_from([5, 6]), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        soft_prompt=st.sampled_from([None, None, *PROMPTS]),
        priority=st.sampled_from([0, 0, 1, BACKGROUND]),
        owner=st.sampled_from(["", "a", "b"]),
        ignore_eos=st.booleans(),
    )
    def ask(self, tokens, max_tokens, soft_prompt, priority, owner, ignore_eos) -> None:
        name = f"r{len(self.asked)}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        self.asked[name] = AddRequest(
            request_id=name,
            token_ids=tokens,
            params=params,
            soft_prompt=soft_prompt,
            priority=priority,
            owner=owner,
        )
        self.received[name] = []
        self.submit(name)

    @precondition(lambda self: self.open())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.open()))
        assert self.scheduler.cancel(name)
        self.ended[name] = "cancelled"

    @rule(kind=st.sampled_from(["kv", "embeddings"]), shortages=st.sampled_from([0, 0, 0, 1, 3]))
    def step(self, kind: str, shortages: int = 0) -> None:
        """The device may have too little memory for it, once or several times."""
        step = self.scheduler.schedule()
        assert step.num_tokens <= self.scheduler.config.max_batch_tokens
        assert len({row.sequence.request_id for row in step.rows}) == len(step.rows)
        self.runner.read(step, kind)
        for _ in range(shortages):
            if len(step.rows) + len(step.prefills) > 1 and not self.scheduler.shrink(step):
                break
        self.take(self.scheduler.postprocess(step, self.runner.run(step)))

    @precondition(lambda self: self.runner.kinds)
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def end_reading(self, data: st.DataObject, fails: bool) -> None:
        sha256 = data.draw(st.sampled_from(sorted(self.runner.kinds)))
        if fails:
            del self.runner.kinds[sha256]
            self.take(self.scheduler.soft_prompt_loads.fail(sha256, "unreadable"))
        else:
            self.runner.finish_read(sha256)

    @rule(ref=st.sampled_from(PROMPTS))
    def delete_soft_prompt(self, ref) -> None:
        self.scheduler.soft_prompts.evict_when_unused(ref.sha256)

    @rule()
    def die(self) -> None:
        self.begin()

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        running = [sequence.request_id for sequence in self.scheduler.running]
        assert sorted(running + [s.request_id for s in self.scheduler.waiting]) == sorted(self.open())

    def teardown(self) -> None:
        """What is left runs to its end; all that ended by itself had exactly its answer."""
        for _ in range(MOST_STEPS):
            if not self.scheduler.has_work:
                break
            self.step("kv")
            for sha256 in list(self.runner.kinds):
                self.runner.finish_read(sha256)
            self.scheduler.check_integrity()
        assert not self.open(), "somebody waits for ever"
        for name, reason in self.ended.items():
            answer = expected(self.asked[name].token_ids, self.asked[name].params)
            if reason in ("error", "cancelled"):
                assert self.received[name] == answer[: len(self.received[name])], name
            else:
                assert self.received[name] == answer, name
        resident = sum(len(prompt.blocks) for prompt in self.scheduler.soft_prompts.all())
        assert self.scheduler.pool.num_used == resident


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=40, stateful_step_count=60, deadline=None, derandomize=True)
