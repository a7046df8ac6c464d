"""How faithful a soft prompt is, by length, kind, objective and training time: figures, plots of docs/compression.md.

    python -m benchmarks.parts.compression_tradeoffs                    # about an hour of one core
    python -m benchmarks.parts.compression_tradeoffs --seconds 20 --lengths 16,64   # a quick look
    python -m benchmarks.parts.compression_tradeoffs --plot             # draw what has been measured

Questions, gold answers and the teacher's states of one example context are made once; then every setting is matched
and trained for the same time and measured on the hand-written questions beside the context, which nothing trained on.
Time is processor time of one thread, so that neither other programs nor pauses show in the figures. What is done is
kept in --out, so that a second call goes on. Plotting takes matplotlib (pip install matplotlib).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softbatch.prompt_store.compression.data.examples import Example, load_jsonl, save_jsonl
from softbatch.prompt_store.compression.data.selection import spread_first, surplus_recitations, usable
from softbatch.prompt_store.compression.data.self_study import template_questions
from softbatch.prompt_store.compression.evaluation.baselines import with_gold
from softbatch.prompt_store.compression.evaluation.fidelity import position_scores
from softbatch.prompt_store.compression.frozen.context import Context
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import TrainingPair
from softbatch.prompt_store.compression.training.hidden_states import (
    Observed,
    TeacherOutputs,
    hidden_states_of,
    without,
)
from softbatch.prompt_store.compression.training.matching import MatchingSettings, fit, selected
from softbatch.prompt_store.compression.training.student import Student
from softbatch.prompt_store.compression.training.trainer import Trainer, TrainingSettings
from softbatch.server.compressions.prepare import ModelFiles
from softbatch.server.compressions.request import ModelChoice
from softbatch.server.compressions.session import CompressionSession

ROOT = Path(__file__).resolve().parents[2]
ANSWER_TOKENS = 48
BATCH = 8
OBSERVED = 160
MAX_PROMPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Prepared:
    """One context with its training pairs and the teacher's states, and the questions to measure on."""

    bench: CompressionSession
    context: Context
    pairs: list[TrainingPair]
    states: list[Tensor]
    asked: list[TrainingPair]
    asked_states: list[Tensor]
    no_context_kl: float
    watched: list[TrainingPair]
    observed: dict[int, list[Observed]]

    def closed(self, prefix: Prefix | None) -> dict[str, float]:
        found = hidden_states_of(self.bench.decoder, [prefix], self.asked, BATCH).states
        scores = position_scores(self.bench.decoder, found, self.asked_states, self.asked)
        return {"kl_closed": 1 - scores.kl / self.no_context_kl, "top1_agreement": scores.top1_agreement}

    def observe(self, length: int) -> list[Observed]:
        """Kept for one length at a time: they take a gigabyte."""
        if length not in self.observed:
            self.observed.clear()
            watched = len(self.watched)
            found = hidden_states_of(self.bench.decoder, self.context.full, self.watched, BATCH, watched, length)
            self.observed[length] = found.observed
        return self.observed[length]


def prepare(example: str, model: str, questions: int, out: Path) -> Prepared:
    text = (ROOT / "examples" / example / "context.md").read_text()
    files = ModelFiles.open(ModelChoice(model))
    tokenized = files.context(text, None, ANSWER_TOKENS)
    bench = CompressionSession.open(files, tokenized, MAX_PROMPT_BYTES)
    context = Context(bench.decoder, tokenized)

    def answered(path: Path, examples: list[Example]) -> list[Example]:
        done = load_jsonl(path) if path.exists() else []
        while len(done) < len(examples):
            part = examples[len(done) : len(done) + 128]
            answers = with_gold(context, part, bench.generate)
            done += [a if (a.output or "").strip() else q for a, q in zip(answers, part, strict=True)]
            save_jsonl(done, path)
            print(f"gold answers: {len(done)} of {len(examples)}", flush=True)
        return [found for found in done if usable(found)]

    tag = f"{example}-{Path(model).name}"
    train = answered(out / f"{tag}-train.jsonl", template_questions(text, questions))
    hand = answered(out / f"{tag}-hand.jsonl", load_jsonl(ROOT / "examples" / example / "questions.jsonl"))
    bench.release_engine()
    train = spread_first(train, OBSERVED)
    pairs, asked = [context.pair(one) for one in train], [context.pair(one) for one in hand]
    states, asked_states = (
        hidden_states_of(bench.decoder, context.full, which, BATCH).states for which in (pairs, asked)
    )
    nothing = context.renderer.without_context()
    bare = hidden_states_of(bench.decoder, [bench.decoder.encode(nothing) if nothing else None], asked, BATCH).states
    no_context = position_scores(bench.decoder, bare, asked_states, asked).kl
    watched = pairs[:OBSERVED]
    pairs, teacher_outputs = without(pairs, TeacherOutputs(states, []), surplus_recitations(train))
    return Prepared(bench, context, pairs, teacher_outputs.states, asked, asked_states, no_context, watched, {})


def measure(prepared: Prepared, kind: str, objective: str, length: int, seconds: float) -> dict[str, Any]:
    """One setting; two fifths of its time go to selection and matching. Observing, the same for all, is not counted."""
    decoder, context = prepared.bench.decoder, prepared.context
    observed = prepared.observe(length)
    clock = time.process_time
    began = clock()
    student = Student(decoder, "embeddings", {"embeddings": context.untrained_embeddings(length)})
    if kind == "kv":
        student = Student.from_prefix(decoder, selected(decoder, context.full, observed, length))
    fit(student, observed, MatchingSettings(seconds=max(0.01, 0.4 * seconds - (clock() - began))), clock)
    left = max(1.0, seconds - (clock() - began))
    settings = TrainingSettings(objective=objective, seconds=left)
    result = Trainer(student, prepared.pairs, prepared.states, settings, clock=clock).run()
    return {
        "kind": kind,
        "objective": objective,
        "virtual_tokens": length,
        "seconds": seconds,
        "steps": result.steps,
        **prepared.closed(student.fixed_prefix()),
    }


def plot(rows: list[dict[str, Any]], seconds: float, length: int, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    looks = {("kv", "kl"): "C0-o", ("kv", "nll"): "C0--s", ("embeddings", "kl"): "C1-o", ("embeddings", "nll"): "C1--s"}
    for axis, fixed, value, label in (
        ("virtual_tokens", "seconds", seconds, f"virtual tokens ({seconds:g} s on one core each)"),
        (
            "seconds",
            "virtual_tokens",
            length,
            f"seconds on one core ({length} virtual tokens)",
        ),
    ):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
        for (kind, objective), look in looks.items():
            mine = [r for r in rows if (r["kind"], r["objective"], r[fixed]) == (kind, objective, value)]
            mine.sort(key=lambda row: row[axis])
            axes.plot([r[axis] for r in mine], [r["kl_closed"] for r in mine], look, label=f"{kind}, {objective}")
        if axis == "virtual_tokens":
            cut = {r[axis]: r["truncated"] for r in rows if r[fixed] == value}
            axes.plot(sorted(cut), [cut[n] for n in sorted(cut)], "k:", label="context cut to as many tokens")
        axes.set(xscale="log", xlabel=label, ylabel="kl_closed, hand-written questions")
        ticks = sorted({row[axis] for row in rows if row[fixed] == value})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(out / f"kl-closed-by-{axis.replace('_', '-')}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", default="manual", help="a folder of examples/")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", default="8,16,32,64,128")
    parser.add_argument("--seconds", type=float, default=30.0, help="of matching and training, by length")
    parser.add_argument("--times", default="15,60,180", help="seconds, at --length virtual tokens")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--objectives", default="kl,nll")
    parser.add_argument("--questions", type=int, default=640, help="fewer than compress asks: runs are short")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "compression")
    parser.add_argument("--plot", action="store_true", help="only draw what has been measured")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"results-{arguments.example}-{Path(arguments.model).name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if not arguments.plot:
        points = [(int(n), arguments.seconds) for n in arguments.lengths.split(",")]
        points += [(arguments.length, float(s)) for s in arguments.times.split(",")]
        torch.manual_seed(0)
        torch.set_num_threads(1)
        prepared = prepare(arguments.example, arguments.model, arguments.questions, out)
        for length, seconds in sorted(set(points)):
            for objective, kind in product(arguments.objectives.split(","), ("kv", "embeddings")):
                setting = {"kind": kind, "objective": objective, "virtual_tokens": length, "seconds": seconds}
                if any(setting.items() <= row.items() for row in rows):
                    continue
                cut = next((row["truncated"] for row in rows if row["virtual_tokens"] == length), None)
                if cut is None:
                    cut = prepared.closed(prepared.context.truncated(length))["kl_closed"]
                rows.append({**measure(prepared, kind, objective, length, seconds), "truncated": cut})
                path.write_text(json.dumps(rows, indent=1))
                print(json.dumps(rows[-1]), flush=True)
    plot(rows, arguments.seconds, arguments.length, out)


if __name__ == "__main__":
    main()
