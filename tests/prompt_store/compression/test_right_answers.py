"""Passages, their ranking, and which answers are right, in any language; and the report's table of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.accepted import Share, is_right
from softbatch.prompt_store.compression.data.examples import DataError, Example, load_jsonl, save_jsonl
from softbatch.prompt_store.compression.data.passage_index import PassageIndex, within
from softbatch.prompt_store.compression.data.passages import before_question, cut, joined
from softbatch.prompt_store.compression.evaluation.free_answers import (
    Answers,
    FreeAnswers,
    Response,
    Sigma,
    load_answers,
    save_answers,
)
from softbatch.prompt_store.compression.evaluation.page import render_page
from softbatch.prompt_store.compression.evaluation.verdict import verdict_of
from softbatch.prompt_store.compression.frozen.frozen_model import Decoder
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.pipeline import Compression
from tests.support.models import Reference
from tests.support.small_compressions import CONTEXT, SMALL, engine, responder

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("The limit is £2,500 a month.", "2500"),
        ("It is **2 500** in all", "2,500"),
        ("5V", "5 V"),
        ("15% of it", "15 percent"),
        ("use `X-Quay-Key`", "x-quay-key"),
        ("Error ＮＯ＿ＳＨＯＷ", "no_show"),
        ("Use lithium batteries", ["battery", "lithium"][1]),
        ("twenty minutes", "minute"),
        ("港口办公室在七点开门。", "七点"),
        ("Öffnet um SIEBEN Uhr", "sieben uhr"),
        ("a + b", "+"),
    ],
)
def test_an_answer_is_right_however_it_is_written(answer: str, accepted: str) -> None:
    assert is_right(answer, ("nothing of it", accepted))


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("It takes 30 days", "3"),
        ("November", "no"),
        ("1,900", "900"),
        ("20 hours", "20 minutes"),
        ("", "x"),
        ("E12", "E1"),
    ],
)
def test_a_part_of_a_word_or_number_is_not(answer: str, accepted: str) -> None:
    assert not is_right(answer, (accepted,))


def test_wilsons_interval() -> None:
    low, high = Share(22, 30).bounds
    assert (round(low, 3), round(high, 3)) == (0.556, 0.858)
    assert Share(0, 10).bounds[0] == 0
    assert Share(10, 10).bounds[1] == pytest.approx(1)


def test_accept_is_read_written_and_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"input": "How long?", "accept": "20 minutes"}\n{"input": "Who?", "accept": ["a", "b"]}\n')
    found = load_jsonl(path)
    assert [example.accept for example in found] == [("20 minutes",), ("a", "b")]
    save_jsonl(found, path)
    assert load_jsonl(path) == found
    for wrong in ("[]", "3", '["a", ""]', '[["a"]]'):
        path.write_text('{"input": "Who?"}\n{"input": "Who?", "accept": ' + wrong + "}")
        with pytest.raises(DataError, match="line 2: accept must be a text"):
            load_jsonl(path)


def test_passages_keep_rows_whole_and_say_what_stands_above_them() -> None:
    text = (EXAMPLES / "manual" / "context.md").read_text(encoding="utf-8")
    found = cut(text)
    assert all(text[one.start : one.end] in one.text for one in found)
    assert [one.start for one in found] == sorted({one.start for one in found})
    row = next(one for one in found if "| E8 |" in one.text)
    assert row.text.startswith("Error codes\n| Code | Meaning | What to do |\n")
    assert "| E8 | Pressure sensor fault | Return the console for repair |" in row.text


@pytest.mark.parametrize(
    "text", ["a b c d " * 3000, "x" * 9000 + " b c d e", "港口办公室七点开门。" * 900, "", "\n\n", "|||"]
)
def test_no_passage_is_long_whatever_the_text(text: str) -> None:
    found = cut(text)
    assert all(len(passage.text) <= 4 * 220 for passage in found)
    PassageIndex(text).best("b 七点 ?", 3)


@pytest.mark.parametrize("name", ["manual", "policy", "api"])
def test_the_examples_can_be_answered_from_two_passages(name: str) -> None:
    """Every accepted text stands in the context, and most in what is found."""
    text = (EXAMPLES / name / "context.md").read_text(encoding="utf-8")
    index, asked = PassageIndex(text), load_jsonl(EXAMPLES / name / "questions.jsonl")
    everything = joined(index.passages)
    assert all(is_right(everything, example.accept) for example in asked)
    assert sum(is_right(joined(index.best(e.input, 2)), e.accept) for e in asked) >= 28


def test_ranking_knows_other_scripts_and_forms() -> None:
    text = (
        "港口办公室七点开门,进入前请按两次铜铃,然后等待工作人员来开门。"
        + "船只必须在中午前离开,钥匙在门垫下面,请不要忘记归还给我们。" * 2
    )
    index = PassageIndex(text)
    assert "铜铃" in index.best("要按几次铜铃？", 1)[0].text
    index = PassageIndex("# A\n\nThe batteries are kept in a box.\n\n# B\n\nThe anchors are kept in a locker.")
    assert "batteries" in index.best("Which battery?", 1)[0].text
    assert index.best("Zzyx?", 2) == []
    assert index.best("battery", 0) == []


def test_the_name_of_a_text_finds_no_passage_before_others() -> None:
    """It stands in few passages and in most questions: by its rarity alone it outweighed what is asked."""
    text = (
        "# Orrery handbook\n\nOrrery is what we call the mill. Orrery was built by Orrery's founder.\n\n"
        "## Oil\n\nThe main bearing takes forty grams of grease a week, in winter sixty.\n\n"
        "## Doors\n\nThe east door is locked from dusk on, and the miller has the key."
    )
    index = PassageIndex(text)
    assert "forty" in index.best("How much grease does the bearing of the Orrery take?", 1)[0].text
    assert "founder" in index.best("Orrery?", 1)[0].text


@pytest.mark.parametrize(("name", "right"), [("manual", 30), ("policy", 38), ("api", 27)])
def test_most_examples_can_be_answered_from_the_best_passage(name: str, right: int) -> None:
    index = PassageIndex((EXAMPLES / name / "context.md").read_text(encoding="utf-8"))
    asked = load_jsonl(EXAMPLES / name / "questions.jsonl")
    assert sum(is_right(joined(index.best(e.input, 1)), e.accept) for e in asked) >= right


def test_the_best_passage_stands_nearest_to_the_question() -> None:
    index = PassageIndex((EXAMPLES / "policy" / "context.md").read_text(encoding="utf-8"))
    found = index.best("What is the hotel limit in Zurich?", 3)
    written = before_question(found, "What is it?")
    assert written == "\n\n".join([found[2].text, found[1].text, found[0].text, "What is it?"])
    assert "Zurich" in found[0].text
    assert before_question([], "What is it?") == "What is it?"


def test_within_takes_the_best_in_any_case() -> None:
    found = cut((EXAMPLES / "api" / "context.md").read_text(encoding="utf-8"))[:3]
    assert within(found, [90, 20, 90], 64) == found[:1]
    assert within(found, [40, 20, 90], 64) == found[:2]
    assert within([], [], 64) == []


def test_questions_with_accepted_answers_are_measured_and_never_trained_on(llama: Reference, tmp_path: Path) -> None:
    decoder = Decoder(copy.deepcopy(llama.model))
    decoder.window = 4096
    settings = CompressionSettings(**SMALL)
    context = TokenizedContext(llama.tokenizer, CONTEXT, None, settings.max_answer_tokens, 4096)
    asked: list[tuple[str, bool]] = []
    right = {"How many bulbs has the red lamp?": "2 bulbs", "Whom do I call about the green lamp?": "greenville"}
    questions = {tuple(context.renderer.question(text)): answer for text, answer in right.items()}
    usual = responder(decoder)

    def respond(prompts: list[list[int]], max_tokens: int, sigma: Sigma | None) -> list[Response]:
        """Right with σ, and only there."""
        found = usual(prompts, max_tokens, sigma)
        for at, prompt in enumerate(prompts):
            if sigma is not None and tuple(prompt) in questions:
                answer = context.renderer.tokens(f"It is {questions[tuple(prompt)]}.")
                found[at] = Response(answer, 0.004)
                asked.append((context.renderer.text(prompt), True))
        return found

    users = [Example(text, accept=(answer,)) for text, answer in right.items()]
    users += [Example("What colour is the blue lamp?", "Blue.")]
    run = Compression(decoder, context, settings, engine(decoder), respond, tmp_path, users)
    report = run.run().report
    rows = report["right_answers"]
    assert (rows["soft_prompt"]["right"], rows["soft_prompt"]["questions"]) == (2, 2)
    assert rows["soft_prompt"]["low"] == pytest.approx(0.342, abs=0.001)
    assert rows["full_context"]["right"] == 0
    assert (
        rows["full_context"]["prompt_tokens"]
        > rows["retrieval_3x"]["prompt_tokens"]
        >= rows["retrieval"]["prompt_tokens"]
    )
    assert rows["recall"]["prompt_tokens"] > rows["soft_prompt"]["prompt_tokens"] > 8
    assert len(asked) == 2
    trained = [example.input for example in load_jsonl(tmp_path / "train.jsonl")]
    assert "What colour is the blue lamp?" in trained
    assert not set(right) & set(trained)
    assert not set(right) & {example.input for example in load_jsonl(tmp_path / "held_out.jsonl")}
    assert "2 of 2" in render_page(report)
    assert "right answers: 2 of 2" in report["verdict"]
    assert report["baselines"]["full_context"]["exact_match"] == 1, "its gold answers come from the same engine"


def test_a_small_window_gets_fewer_passages(llama: Reference) -> None:
    context = TokenizedContext(llama.tokenizer, CONTEXT, None, 6, 4096)
    seen: list[list[int]] = []

    def respond(prompts: list[list[int]], max_tokens: int, sigma: Sigma | None) -> list[Response]:
        seen.extend(prompts)
        return [Response([2]) for _ in prompts]

    asked = [Example("How many bulbs has the red lamp?", accept=("2",))]
    FreeAnswers(context, asked, 8, respond).ask("recall")
    context.window = len(seen[0]) + 8 + 6 - 1
    FreeAnswers(context, asked, 8, respond).ask("recall")
    assert len(context.renderer.question(asked[0].input)) < len(seen[1]) < len(seen[0])


def test_retrieval_gets_as_many_tokens_as_recall_has(llama: Reference) -> None:
    """Whichever count of passages comes nearest, for each question: neither side has the longer prompt."""
    text = (EXAMPLES / "policy" / "context.md").read_text(encoding="utf-8")
    context = TokenizedContext(llama.tokenizer, text, None, 6, 4096)
    lengths: list[list[int]] = []

    def respond(prompts: list[list[int]], max_tokens: int, sigma: Sigma | None) -> list[Response]:
        lengths.append([len(prompt) for prompt in prompts])
        return [Response([2]) for _ in prompts]

    asked = load_jsonl(EXAMPLES / "policy" / "questions.jsonl")
    free = FreeAnswers(context, asked, 64, respond)
    for name in ("recall", "retrieval_recall", "retrieval_3x"):
        free.ask(name)
    recall, same, _ = lengths
    longest = max(len(context.renderer.tokens(passage.text)) for passage in cut(text))
    assert all(abs(64 + a - b) <= longest for a, b in zip(recall, same, strict=True))
    assert abs(64 + sum(recall) / len(recall) - sum(same) / len(same)) < longest / 4


def test_answers_to_passages_in_another_order_are_asked_for_again(tmp_path: Path) -> None:
    found = {"retrieval": Answers(["2"], 40.0, None)}
    path = tmp_path / "answers.json"
    save_answers(found, path)
    assert load_answers(path) == found
    record = json.loads(path.read_text(encoding="utf-8"))
    for older in (record | {"order": record["order"] - 1}, record["answers"]):
        path.write_text(json.dumps(older), encoding="utf-8")
        assert load_answers(path) == {}


def test_the_verdict_says_what_would_do_better() -> None:
    def row(right: int) -> dict[str, int]:
        return {"right": right, "questions": 30}

    report = {
        "kl": 0.1,
        "kl_closed": 0.93,
        "training": {"steps": 400, "minutes": 10},
        "baselines": {"untrained": {"kl_closed": 0.3}},
        "right_answers": {"soft_prompt": row(14), "recall": row(22), "full_context": row(19), "retrieval_3x": row(20)},
    }
    assert verdict_of(report, None).endswith("20 of three times as many: keep its text and use recall")
    report["right_answers"]["retrieval_3x"] = row(23)
    assert verdict_of(report, None).endswith("retrieval alone does better")
    report["right_answers"] |= {"retrieval_3x": row(20), "retrieval_recall": row(23)}
    assert verdict_of(report, None).endswith(
        "23 of as many as with recall: for questions like these retrieval alone does better"
    )
    report["right_answers"]["soft_prompt"] = row(23)
    assert "better" not in verdict_of(report, None)


def test_lines_that_look_like_tables_cost_no_more_than_others() -> None:
    """Both took hours: a rule that is none at its end, and rules under rules."""
    rule = "|\n|" + "-" * 1_000_000 + "x\n"
    assert cut(rule + "A word or two about something.\n")
    assert cut("| a |\n" + "|-\n" * 100_000 + "A word or two about something.\n")
