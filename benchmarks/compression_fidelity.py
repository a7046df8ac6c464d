"""How faithful the soft prompts of the example contexts are for a budget of processor time: docs/compression.md.

    python benchmarks/compression_fidelity.py                       # three contexts, 10 minutes of one core each
    python benchmarks/compression_fidelity.py --examples manual --kind embeddings

What `softbatch compress` does with its defaults, but on one thread and with processor time in place of wall time, so
that neither other programs nor pauses show in the figures; then what `softbatch evaluate` does with the hand-written
questions beside the context, which nothing trained on. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prompt_store.compression.evaluate import evaluate_prompt
from prompt_store.compression.pipeline import Compression
from prompt_store.compression.self_study import load_jsonl
from prompt_store.compression.settings import CompressionSettings
from prompt_store.compression.trainer import Progress
from server.compression.request import ModelChoice
from server.compression.run import ANSWERING
from server.compression.workbench import Workbench, count_tokens, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MAX_PROMPT_BYTES = 1 << 30
SHOWN = ("kl_closed", "top1_agreement", "token_f1")


def open_bench(model: str, text: str, settings: CompressionSettings) -> Workbench:
    choice = ModelChoice(model)
    tokens = count_tokens(load_tokenizer(choice), text, None)
    return Workbench.open(choice, tokens, settings.max_answer_tokens, MAX_PROMPT_BYTES)


def measure(example: str, model: str, settings: CompressionSettings, out: Path) -> dict[str, Any]:
    folder = ROOT / "examples" / example
    text = (folder / "context.md").read_text()
    bench = open_bench(model, text, settings)
    phase = ""

    def on_progress(progress: Progress) -> None:
        nonlocal phase
        if progress.phase not in ANSWERING:
            bench.release_engine()
        if progress.phase != phase:
            phase = progress.phase
            print(f"{example}: {phase}, {time.process_time():.0f} s", flush=True)

    directory = out / f"{example}-{Path(model).name}-{settings.kind}-{settings.virtual_tokens}"
    try:
        outcome = Compression(
            bench.decoder,
            bench.tokenizer,
            text,
            settings,
            bench.generate,
            directory,
            on_progress=on_progress,
            clock=time.process_time,
        ).run(resume=True)
    finally:
        bench.release_engine()
    bench = open_bench(model, text, settings)
    try:
        asked = load_jsonl(folder / "questions.jsonl")
        found = evaluate_prompt(
            bench.decoder, bench.tokenizer, settings.kind, outcome.tensors, text, asked, bench.generate
        )
    finally:
        bench.release_engine()
    training = outcome.report["training"]
    return {
        "example": example,
        "settings": asdict(settings),
        "compression_ratio": found["compression_ratio"],
        "seconds": outcome.report["seconds"],
        "questions": training["questions"],
        "steps": training["steps"],
        **{name: found[name] for name in SHOWN},
        "truncated": {name: found["baselines"]["truncated"][name] for name in SHOWN},
        "held_out": {name: outcome.report[name] for name in SHOWN},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", default="manual,policy,api", help="folders of examples/")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kind", choices=("kv", "embeddings"), default="kv")
    parser.add_argument("--virtual-tokens", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "fidelity")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = CompressionSettings(kind=options.kind, virtual_tokens=options.virtual_tokens, minutes=options.minutes)
    print("| context | kind | compression | kl_closed | top-1 | truncated: kl_closed | top-1 | steps | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for example in options.examples.split(","):
        row = measure(example, options.model, settings, options.out)
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"| {example} | {options.kind} | {row['compression_ratio']:.1f}× | {row['kl_closed']:.3f} | "
            f"{row['top1_agreement']:.3f} | {row['truncated']['kl_closed']:.3f} | "
            f"{row['truncated']['top1_agreement']:.3f} | {row['steps']} | {row['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
