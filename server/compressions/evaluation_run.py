"""Measure a registered soft prompt on questions it has never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.evaluation.baselines import evaluate_prompt
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.soft_prompt_file import check_fits, load
from softbatch.prompt_store.stores.store import SoftPromptStore
from softbatch.server.compressions.other_prompts import other_prefix
from softbatch.server.compressions.prepare import ModelFiles
from softbatch.server.compressions.request import ModelChoice
from softbatch.server.compressions.session import CompressionSession

LONGEST_ANSWER = CompressionSettings.max_answer_tokens


def evaluate(
    store: SoftPromptStore,
    name: str,
    context: str,
    questions: Sequence[Example],
    choice: ModelChoice,
    on_progress: Callable[[Progress], None],
) -> dict[str, Any]:
    """The report, with the keys that a compression's has. A question's own output is the gold answer where it has
    one, else what the model answers with the full context. Raises ValueError, SoftPromptError or ModelError."""
    prompt = load(store.local_file(store.get(name)), store.max_bytes)
    manifest = prompt.manifest
    training = manifest.training
    instruction, longest = training.get("instruction"), training.get("max_answer_tokens")
    instruction = instruction if isinstance(instruction, str) else None
    longest = longest if isinstance(longest, int) and 4 <= longest <= 4096 else LONGEST_ANSWER
    files = ModelFiles.open(choice)
    tokenized = files.context(context, instruction, longest)
    session = CompressionSession.open(files, tokenized, store.max_bytes)
    try:
        check_fits(prompt, session.spec)
        report = evaluate_prompt(
            session.decoder,
            tokenized,
            manifest.kind,
            prompt.tensors,
            questions,
            session.generate,
            session.respond,
            wrong_prefix=other_prefix(
                store, session.decoder, session.spec, tokenized.sha256, manifest.num_virtual_tokens, besides=name
            ),
            replaces=manifest.replaces,
            on_progress=on_progress,
        )
    finally:
        session.release_engine()
    return report | {"seconds": manifest.fidelity.get("seconds"), "objective": manifest.objective}
