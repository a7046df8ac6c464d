"""From context to report with a tiny random model: resume, budget, long contexts, the report's keys and page."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.examples import Example, load_jsonl
from softbatch.prompt_store.compression.data.selection import usable
from softbatch.prompt_store.compression.evaluation.baselines import evaluate_prompt
from softbatch.prompt_store.compression.evaluation.fidelity import answer_scores, position_scores, token_f1
from softbatch.prompt_store.compression.evaluation.page import render_page
from softbatch.prompt_store.compression.evaluation.report import break_even, thinned
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.greedy import greedy
from softbatch.prompt_store.compression.frozen.prefix import Prefix
from softbatch.prompt_store.compression.frozen.rendering import Renderer, TrainingPair, group_of
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.pace import Stopped
from softbatch.prompt_store.compression.pipeline import Compression, Outcome
from softbatch.prompt_store.compression.progress import Progress
from softbatch.prompt_store.compression.training.student import Student
from softbatch.prompt_store.template import context_turn, render_chat
from tests.support.models import Reference
from tests.support.small_compressions import CONTEXT, SMALL, engine, responder

METRICS = {
    "kl",
    "kl_p95",
    "kl_closed",
    "top1_agreement",
    "top5_overlap",
    "rank_correlation",
    "entropy_gap",
    "nll",
    "exact_match",
    "token_f1",
}
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def compression(llama: Reference, directory: Path, context: str = CONTEXT, **options: Any) -> Compression:
    decoder = Decoder(copy.deepcopy(llama.model))
    decoder.window = 4096
    names = (
        "user_examples",
        "on_progress",
        "on_preview",
        "should_stop",
        "clock",
        "wrong_prefix",
        "generate",
        "opening",
    )
    extra = {name: options.pop(name) for name in names if name in options}
    settings = CompressionSettings(**(SMALL | options))
    generate = extra.pop("generate", engine(decoder))
    tokenized = tokenized_context(llama, context, settings, decoder.window)
    return Compression(decoder, tokenized, settings, generate, responder(decoder), directory, **extra)


def tokenized_context(
    llama: Reference, text: str, settings: CompressionSettings, window: int = 4096
) -> TokenizedContext:
    return TokenizedContext(llama.tokenizer, text, settings.instruction, settings.max_answer_tokens, window)


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted, and where it left its files."""

    outcome: Outcome
    directory: Path


@pytest.fixture(scope="module")
def whole(llama: Reference, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    directory = tmp_path_factory.mktemp("whole")
    return Whole(compression(llama, directory).run(), directory)


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_report_has_every_key_and_sensible_figures(llama: Reference, tmp_path: Path, kind: str) -> None:
    phases: list[Progress] = []
    outcome = compression(llama, tmp_path, kind=kind, on_progress=phases.append).run()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= METRICS | {"compression_ratio", "seconds", "baselines", "off_topic", "answers", "curve"}
    baselines = report["baselines"]
    assert set(baselines) == {"no_context", "truncated", "untrained", "wrong_prompt", "full_context"}
    assert all(set(scores) == METRICS for scores in baselines.values())
    assert baselines["no_context"]["kl_closed"] == 0
    full = baselines["full_context"]
    assert full["kl"] == pytest.approx(0, abs=1e-5)
    assert full["top1_agreement"] == full["top5_overlap"] == full["exact_match"] == full["token_f1"] == 1
    assert full["rank_correlation"] == pytest.approx(1, abs=1e-6)
    assert report["compression_ratio"] == pytest.approx(outcome.context_tokens / 8, abs=1e-3)
    assert {progress.phase for progress in phases} >= {"self_study", "gold", "evaluation", "teacher", "training"}
    for groups in (report["by_kind"], report["by_place"]):
        told = report["evaluation"]["questions"] - (0 if groups is report["by_kind"] else groups_of_the_whole(report))
        assert sum(group["questions"] for group in groups.values()) == told
        assert min(group["kl"] for group in groups.values()) <= report["kl"] <= max(g["kl"] for g in groups.values())
    assert len(report["answers"]) == 3
    assert report["training"]["steps"] == 4
    assert report["training"]["minutes"] is None, "steps bound the run, so there was no budget"
    assert "minutes" not in report["verdict"]
    sizes = {"embeddings": (8, 64), "keys": (3, 8, 2, 8), "values": (3, 8, 2, 8)}
    assert {name: tuple(t.shape) for name, t in outcome.tensors.items()} == {n: sizes[n] for n in outcome.tensors}
    assert all(tensor.dtype == torch.float32 for tensor in outcome.tensors.values())
    student = Student(Decoder(copy.deepcopy(llama.model)), kind, outcome.tensors)  # type: ignore[arg-type]
    assert student.fixed_prefix().length == 8


def groups_of_the_whole(report: dict[str, Any]) -> int:
    return int(report["by_kind"].get("general", {"questions": 0})["questions"])


def test_same_seed_same_prompt(llama: Reference, whole: Whole, tmp_path: Path) -> None:
    second = compression(llama, tmp_path).run()
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in whole.outcome.tensors.items())


@pytest.mark.parametrize("stop_after", [1, 3, 8, 9, 11])
def test_a_stopped_run_goes_on_and_gives_the_same(
    llama: Reference, whole: Whole, tmp_path: Path, stop_after: int
) -> None:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > stop_after

    with pytest.raises(Stopped):
        compression(llama, tmp_path / "cut", should_stop=stop).run()
    resumed = compression(llama, tmp_path / "cut").run(resume=True)
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.outcome.tensors.items())
    with pytest.raises(ValueError, match="resume"):
        compression(llama, tmp_path / "cut", seed=9).run(resume=True)


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
def test_a_preview_comes_before_all_else_and_changes_nothing(
    llama: Reference, whole: Whole, tmp_path: Path, kind: str
) -> None:
    previews: list[Outcome] = []
    phases: list[str] = []

    def on_preview(preview: Outcome) -> None:
        assert not {"answers", "teacher", "matching", "training"} & set(phases), "made of the first answers"
        assert "preview" in phases
        previews.append(preview)

    outcome = compression(
        llama, tmp_path, kind=kind, on_preview=on_preview, on_progress=lambda progress: phases.append(progress.phase)
    ).run()
    (preview,) = previews
    assert {name: t.shape for name, t in preview.tensors.items()} == {n: t.shape for n, t in outcome.tensors.items()}
    assert not all(torch.equal(tensor, outcome.tensors[name]) for name, tensor in preview.tensors.items())
    assert (preview.kind, preview.context_sha256) == (kind, outcome.context_sha256)
    assert preview.report["kl"] > 0
    assert preview.report["kl_closed"] == pytest.approx(
        1 - preview.report["kl"] / outcome.report["baselines"]["no_context"]["kl"], abs=1e-4
    )
    assert preview.report["verdict"].startswith("preview: not trained")
    if kind == "kv":
        assert all(torch.equal(tensor, whole.outcome.tensors[name]) for name, tensor in outcome.tensors.items())


def test_gold_answers_are_not_asked_for_twice(llama: Reference, tmp_path: Path) -> None:
    asked: list[tuple[int, ...]] = []

    def counting(decoder: Decoder) -> Any:
        def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
            asked.extend(tuple(prompt) for prompt in prompts)
            return engine(decoder)(prompts, max_tokens)

        return generate

    decoder = Decoder(copy.deepcopy(llama.model))
    compression(llama, tmp_path, generate=counting(decoder)).run()
    assert len(asked) == len(set(asked)) > 15
    prefix = tuple(Renderer(llama.tokenizer).context(CONTEXT))
    assert all(prompt[: len(prefix)] == prefix for prompt in asked), "every prompt shares the context's tokens"
    before = len(asked)
    (tmp_path / "report.json").unlink()
    compression(llama, tmp_path, generate=counting(decoder)).run(resume=True)
    assert len(asked) == before


def test_users_questions_come_first_and_are_trained_on(llama: Reference, tmp_path: Path) -> None:
    mine = [Example(f"What about lamp {n}?", "It is fine." if n % 2 else None) for n in range(5)]
    compression(llama, tmp_path, user_examples=mine).run()
    training, held_out = load_jsonl(tmp_path / "train.jsonl"), load_jsonl(tmp_path / "held_out.jsonl")
    assert [example.input for example in training[:5]] == [example.input for example in mine]
    assert training[1].output == "It is fine."
    assert all(example.source != "user" for example in held_out)


def test_a_context_longer_than_the_window_is_cut_into_segments(llama: Reference, tmp_path: Path) -> None:
    decoder = Decoder(copy.deepcopy(llama.model))
    decoder.window = 384 + 6 + 120
    settings = CompressionSettings(**SMALL)
    tokenized = tokenized_context(llama, CONTEXT, settings, decoder.window)
    run = Compression(decoder, tokenized, settings, engine(decoder), responder(decoder), tmp_path)
    assert len(run.context.segments) >= 3
    assert all(len(segment.ids) <= 120 for segment in run.context.segments)
    assert run.context.segments[-1].end == 1
    texts = "".join(llama.tokenizer.decode(segment.ids) for segment in run.context.segments)
    assert all(f"{name}ville" in texts for name in ("red", "green", "blue", "white"))
    outcome = run.run()
    assert outcome.report["segments"] == len(run.context.segments)
    assert outcome.report["baselines"]["full_context"]["kl"] == pytest.approx(0, abs=1e-5)


def test_users_questions_are_answered_from_the_segment_that_they_are_about(llama: Reference, tmp_path: Path) -> None:
    run = compression(llama, tmp_path)
    names = ("red", "green", "blue", "white")
    asked = [Example(f"Does the {name} lamp need cleaning?") for name in names]
    assert run.context.tokenized.placed(asked) == asked, "a context in one piece is all there"
    cut = tokenized_context(llama, CONTEXT, run.settings, 384 + 6 + 120)
    told = Example("Does the red lamp need cleaning?", position=0.99)
    *placed, kept, template = cut.placed([*asked, told, Example("What is red?", None, "fact", 0.0, "template")])
    whole = cut.placed([Example("Summarise it.", None, "general", 0.0, "template")] * len(cut.segments))
    assert {group_of(example, cut.segments) for example in whole} == set(range(len(cut.segments)))
    for name, example in zip(names, placed, strict=True):
        assert f"{name} lamp" in cut.renderer.text(cut.segments[group_of(example, cut.segments)].ids)
    assert (kept, template.position) == (told, 0.0)
    answered = cut.placed([Example("Whom do I call?", "The office in whiteville.")])[0]
    assert "whiteville" in cut.renderer.text(cut.segments[group_of(answered, cut.segments)].ids)


def test_questions_are_split_alike_after_a_restart(llama: Reference, tmp_path: Path) -> None:
    """On a real context: some positions of its phrases lie so near a cell's border that rounding moves them over it."""
    text = (EXAMPLES / "policy" / "context.md").read_text(encoding="utf-8")
    first = compression(llama, tmp_path, text, questions=2000)
    second = compression(llama, tmp_path, text, questions=2000)
    assert first.gold.questions([]) == second.gold.questions([])


@pytest.mark.parametrize(
    "context", ["The office opens at seven.", "事務所は七時に開きます。鐘を二度鳴らしてください。"]
)
def test_contexts_that_few_questions_arise_from(llama: Reference, tmp_path: Path, context: str) -> None:
    outcome = compression(llama, tmp_path, context, questions=2000).run()
    assert outcome.report["evaluation"]["questions"] > 0
    assert outcome.report["training"]["questions"] > 0


def test_the_model_asks_questions_of_its_own(llama: Reference, tmp_path: Path) -> None:
    run = compression(llama, tmp_path, model_questions=4)

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        asked = [run.context.renderer.text(prompt) for prompt in prompts]
        replies = [f"How bright is lamp {number}? And why is it so?" for number in range(len(prompts))]
        if any("questions" in text.rpartition("user")[2] for text in asked):
            return [llama.tokenizer.encode(reply) for reply in replies]
        return greedy(run.context.decoder, None, prompts, max_tokens, {2})

    run.gold.generate = generate
    run.run()
    made = [example for example in load_jsonl(tmp_path / "questions.jsonl") if example.source == "model"]
    assert 0 < len(made) <= 4
    assert made[0].input == "How bright is lamp 0?"


def test_a_question_that_leaves_no_room_is_named(llama: Reference, tmp_path: Path) -> None:
    context = tokenized_context(llama, CONTEXT, CompressionSettings(**SMALL))
    context.check_questions([Example("Why " * 500)])  # this window has room for it
    with pytest.raises(ValueError, match="questions: number 2 has"):
        context.check_questions([Example("Why?"), Example("Why " * 5000)])


def test_a_prompt_that_replaces_nothing_is_measured_as_it_is_served(llama: Reference) -> None:
    """Behind it stands the usual system turn, and then the question: one row of tokens, in front of which it lies."""
    decoder = Decoder(copy.deepcopy(llama.model))
    sigma = decoder.encode(list(range(50, 58)))
    usual, question = [9, 8, 7, 6], [30, 31, 32]
    whole = decoder.forward(decoder.embed(torch.tensor([[*usual, *question]])), sigma)[0, -3:]
    apart = decoder.forward(decoder.embed(torch.tensor([question])), decoder.encode(usual, sigma))[0]
    torch.testing.assert_close(apart, whole)


def test_evaluation_puts_the_usual_system_turn_behind_such_a_prompt(llama: Reference) -> None:
    decoder = Decoder(copy.deepcopy(llama.model))
    decoder.window = 4096
    sigma = decoder.encode(list(range(50, 58)))
    behind = decoder.encode(Renderer(llama.tokenizer).without_context(), sigma)
    assert behind.length > 8

    def kl(prefix: Prefix, replaces: Literal["nothing", "system"]) -> float:
        tensors = {"keys": prefix.keys, "values": prefix.values}
        asked = [Example("How many bulbs has the red lamp?")]
        context = tokenized_context(llama, CONTEXT, CompressionSettings(**SMALL))
        return float(
            evaluate_prompt(
                decoder, context, "kv", tensors, asked, engine(decoder), responder(decoder), replaces=replaces
            )["kl"]
        )

    assert kl(sigma, "nothing") == pytest.approx(kl(behind, "system"), rel=1e-4)
    assert kl(sigma, "nothing") != pytest.approx(kl(sigma, "system"), rel=1e-2)


@pytest.mark.parametrize("opening", [0.0, 40.0])
def test_a_budget_is_kept(llama: Reference, tmp_path: Path, opening: float) -> None:
    """Every look at the clock costs 0.2 s; the whole run, opening the model included, must end within its 2 minutes."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.2
        return now

    outcome = compression(llama, tmp_path, steps=None, minutes=2.0, clock=clock, questions=200, opening=opening).run()
    assert 70 < outcome.report["seconds"] <= 120
    baselines = outcome.report["baselines"]
    assert all(baselines[name]["token_f1"] is not None for name in ("no_context", "full_context"))


def test_where_time_is_short_less_is_answered_freely(llama: Reference, tmp_path: Path) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    report = compression(llama, tmp_path, steps=None, minutes=0.7, clock=clock, questions=200).run().report
    assert report["evaluation"]["free_answers"] == 1
    assert all(scores["kl"] is not None for scores in report["baselines"].values())
    assert report["token_f1"] is not None


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        (CONTEXT, {"objective": "mse"}, "objective must be one of"),
        (CONTEXT, {"kind": "lora"}, "kind must be kv or embeddings"),
        (CONTEXT, {"steps": None, "minutes": None}, "minutes or steps"),
        (CONTEXT, {"held_out": 0}, "held_out must lie"),
    ],
)
def test_bad_input_is_named_before_any_work(
    llama: Reference, tmp_path: Path, context: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compression(llama, tmp_path / "x", context, **options)
    assert not (tmp_path / "x").exists()


def test_training_and_serving_render_the_same(llama: Reference) -> None:
    renderer = Renderer(llama.tokenizer, "Answer briefly.")
    whole = context_turn(llama.tokenizer, CONTEXT, "Answer briefly.") + render_chat(
        llama.tokenizer, [{"role": "user", "content": "Why?"}], replaces="system"
    )
    joined = renderer.context(CONTEXT) + renderer.question("Why?")
    assert joined == llama.tokenizer.encode(whole, add_special_tokens=False)
    assert 2 in renderer.stop_ids
    pair = renderer.pair(Example("Why?", "Because."), renderer.segments(CONTEXT, 10_000), 20)
    assert pair.answer[-1] in renderer.stop_ids
    assert renderer.answer(pair.answer, 20, renderer.stop_ids) == ("Because.", False)
    assert renderer.answer(pair.answer[:-1], len(pair.answer) - 1, renderer.stop_ids) == ("Because.", True)


def test_scores_of_known_distributions(llama: Reference) -> None:
    decoder = Decoder(copy.deepcopy(llama.model))
    states = torch.randn(3, decoder.geometry.hidden)
    pair = TrainingPair((5,), (7, 8, 9))
    same = position_scores(decoder, [states], [states], [pair])
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1_agreement == same.top5_overlap == 1
    assert same.rank_correlation == pytest.approx(1)
    assert same.entropy_gap == 0
    flat = position_scores(decoder, [states * 0], [states], [pair])
    entropy = -(decoder.project(states).log_softmax(-1) * decoder.project(states).softmax(-1)).sum(-1).mean().item()
    assert flat.entropy_gap == pytest.approx(math.log(llama.model.config.vocab_size) - entropy, rel=1e-4)
    assert flat.nll == pytest.approx(math.log(llama.model.config.vocab_size), rel=1e-5)
    reverse = position_scores(decoder, [-states], [states], [pair])
    assert reverse.rank_correlation == pytest.approx(-1)
    assert same.closed_against(flat).kl_closed == pytest.approx(1)
    assert flat.closed_against(flat).kl_closed == 0


def test_answer_scores() -> None:
    assert token_f1([1, 2, 3], [2, 3, 4]) == pytest.approx(2 / 3)
    assert token_f1([1, 1], [1]) == pytest.approx(2 / 3)
    assert token_f1([], []) == 1
    assert token_f1([], [1]) == 0
    assert answer_scores(["ab", "c"], ["ab", "d"], lambda text: [ord(letter) for letter in text]) == (0.5, 0.5)
    assert break_even(100, 3) == 34
    assert break_even(1, 0) is None
    assert thinned([(n, float(n), 1.0) for n in range(1, 1001)], 100)[-1] == [1000, 1000.0, 1.0]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_is_self_contained_and_escapes(whole: Whole) -> None:
    report = json.loads((whole.directory / "report.json").read_text())
    report["answers"][0]["input"] = "<script>alert(1)</script>"
    page = render_page(report, "<b>name</b>")
    tags = _Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert "b" not in tags.tags[: tags.tags.index("h1") + 2]
    assert tags.links == []
    assert tags.tags.count("svg") == 4
    assert "&lt;script&gt;" in page
    assert (whole.directory / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_finished_prompt_is_scored_on_new_questions(llama: Reference, whole: Whole) -> None:
    outcome = whole.outcome
    decoder = Decoder(copy.deepcopy(llama.model))
    decoder.window = 4096
    asked = [Example("How many bulbs has the red lamp?"), Example("Whom do I call?", "The office in redville.")]
    steps: list[Progress] = []
    context = tokenized_context(llama, CONTEXT, CompressionSettings(**SMALL))
    report = evaluate_prompt(
        decoder, context, "kv", outcome.tensors, asked, engine(decoder), responder(decoder), on_progress=steps.append
    )
    assert report.keys() >= METRICS | {"baselines", "off_topic", "answers", "compression_ratio"}
    assert report["evaluation"]["questions"] == 2
    assert [answer["input"] for answer in report["answers"]] == [example.input for example in asked]
    assert report["answers"][1]["gold"] == "The office in redville."
    assert report["answers"][1]["full_context"] != "The office in redville."  # what the model says, not the user
    # As imported prompts are, which know nothing of a compression.
    assert "Measured on 2 questions" in render_page(report | {"seconds": None, "objective": None})
    assert steps[-1].done == steps[-1].total == 14
    full_length = {name: tensor.repeat(1, 400, 1, 1) for name, tensor in outcome.tensors.items()}
    with pytest.raises(ValueError, match="fewer than the soft prompt"):
        evaluate_prompt(decoder, context, "kv", full_length, asked, engine(decoder), responder(decoder))


@pytest.mark.parametrize(
    ("answer", "is_kept"), [("Nobody can say.", False), ("Every 4 days, or 5, for 6 seconds.", True)]
)
def test_facts_are_trained_on_where_the_model_finds_them_in_the_text(
    llama: Reference, tmp_path: Path, answer: str, is_kept: bool
) -> None:
    renderer = Renderer(llama.tokenizer)
    context, asking = renderer.context(CONTEXT), renderer.tokens("How often must it be cleaned?")

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        said = renderer.tokens(answer)
        return [said if prompt[: len(context)] == context else asking for prompt in prompts]

    compression(llama, tmp_path, generate=generate, max_answer_tokens=24, facts=0.5, recall=2).run()
    facts = [example for example in load_jsonl(tmp_path / "train.jsonl") if example.kind == "detail"]
    red = [example for example in facts if "red lamp has" in example.passage]
    assert facts
    assert red
    assert all((example.output == answer) is is_kept for example in red)
    assert all(usable(example) is (example.output == answer) for example in facts)


def test_facts_shrink_nothing_that_is_held_out_and_are_not_what_is_graded(llama: Reference, tmp_path: Path) -> None:
    """However many are asked for, and though the model asks in the user's own words what the user grades by."""

    def run(says: str, *graded: Example) -> tuple[list[Example], list[Example]]:
        directory = tmp_path / f"{says}{len(graded)}"
        directory.mkdir()
        said = Renderer(llama.tokenizer).tokens(says)

        def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
            return [said] * len(prompts)

        one = compression(llama, directory, generate=generate, user_examples=graded, facts=1.0)
        return one._questions()

    training, held_out = run("I do not ask.")  # so that sentences with gaps are asked for
    assert "gap" in {example.kind for example in training}
    assert len(held_out) >= SMALL["held_out"]
    asked = "How many bulbs has the red lamp in all of its parts?"
    assert {example.input.endswith(asked) for example in run(asked)[0] if example.kind == "detail"} == {True}
    graded = Example("In all of its parts, how many bulbs has the red lamp?", accept=("2",))
    assert not [example for example in run(asked, graded)[0] if example.kind == "detail"]
