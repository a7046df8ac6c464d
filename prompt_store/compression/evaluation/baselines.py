"""Score a finished soft prompt on questions it has never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from softbatch.prompt_store.compression.compression_settings import Kind
from softbatch.prompt_store.compression.data.examples import Example, Generate
from softbatch.prompt_store.compression.data.selection import usable
from softbatch.prompt_store.compression.evaluation.evaluation import Candidate, Evaluation, Measured
from softbatch.prompt_store.compression.evaluation.free_answers import (
    WITH_SIGMA,
    WITHOUT_SIGMA,
    Answers,
    FreeAnswers,
    Respond,
    Sigma,
)
from softbatch.prompt_store.compression.evaluation.report import build_report
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.training.student import Student
from softbatch.prompt_store.manifest import Replaces


def with_gold(context: Context, examples: Sequence[Example], generate: Generate) -> list[Example]:
    """The examples with the full-context model's answers, where they have none of their own; unusable ones kept."""
    asked, max_answer_tokens = [e for e in examples if e.output is None], context.tokenized.max_answer_tokens
    replies = iter(context.ask(asked, max_answer_tokens, generate) if asked else [])
    stop_ids = context.renderer.stop_ids
    found = []
    for example in examples:
        if example.output is None:
            text, cut = context.renderer.answer(next(replies), max_answer_tokens, stop_ids)
            example = replace(example, output=text, cut=cut)
        found.append(example)
    return found


def measure_baselines(
    evaluation: Evaluation,
    context: Context,
    kind: Kind,
    virtual_tokens: int,
    wrong_prefix: Prefix | None = None,
    on_done: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Every baseline at σ's length; `wrong_prefix` is another document's soft prompt, if there is one."""
    untrained = context.untrained_kv(virtual_tokens)
    if kind == "embeddings":
        start = context.untrained_embeddings(virtual_tokens)
        untrained = Student(context.decoder, "embeddings", {"embeddings": start}).fixed_prefix()
    wrong = wrong_prefix or context.other(virtual_tokens)
    return evaluation.baselines(context.truncated(virtual_tokens), untrained, wrong, on_done)


def evaluate_prompt(
    decoder: Decoder,
    context: TokenizedContext,
    kind: Kind,
    tensors: dict[str, Tensor],
    examples: Sequence[Example],
    generate: Generate,
    respond: Respond,
    wrong_prefix: Prefix | None = None,
    replaces: Replaces = "system",
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """The report of a soft prompt that exists, with the metric keys of report.json, on `examples`, which are all
    answered freely. One that `replaces` nothing is measured as it is served: the model's usual system turn follows it.

    Raises ValueError when the context is shorter than the soft prompt or no question gets a usable answer.
    """
    view = Context(decoder, context)
    prefix = Student(decoder, kind, tensors).fixed_prefix()
    if prefix.length > view.num_tokens:
        raise ValueError(f"the context has {view.num_tokens} tokens, fewer than the soft prompt's {prefix.length}")
    context.check_questions(examples)
    done: list[str] = []

    def on_done(name: str) -> None:
        done.append(name)
        if on_progress is not None:
            on_progress(Progress("evaluation", len(done), 6 + len(WITHOUT_SIGMA) + len(WITH_SIGMA)))

    asked = [e for e in with_gold(view, context.placed(examples), generate) if usable(e)]
    free = FreeAnswers(context, asked, prefix.length, respond, replaces)
    sigma = Sigma(kind, tensors, replaces)
    answers: dict[str, Answers] = {}
    for name in (*WITHOUT_SIGMA, *WITH_SIGMA):
        answers[name] = free.ask(name, sigma if name in WITH_SIGMA else None)
        on_done(name)
    evaluation = Evaluation(decoder, view.renderer, view.segments, view.full, asked, context.max_answer_tokens)
    baselines = measure_baselines(evaluation, view, kind, prefix.length, wrong_prefix, on_done)
    usual = view.renderer.without_context()
    before = decoder.encode(usual, prefix) if replaces == "nothing" and usual else prefix
    measured = evaluation.measure(Candidate.shared(before, len(view.full)))
    on_done("soft_prompt")
    facts = {
        "compression_ratio": round(view.num_tokens / prefix.length, 3),
        "context_tokens": view.num_tokens,
        "virtual_tokens": prefix.length,
        "segments": len(view.segments),
        "kind": kind,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "context_kv_bytes": sum(part.num_bytes for part in view.full),
        "wrong_prompt_is_trained": wrong_prefix is not None,
    }
    return build_report(evaluation, measured, baselines, evaluation.off_topic(before), facts, free, answers)
