"""Questions from a context: coverage, duplicates, splits that never leak, and files with clear errors."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbatch.prompt_store.compression.data.examples import DataError, Example, load_jsonl, save_jsonl
from softbatch.prompt_store.compression.data.passages import passages
from softbatch.prompt_store.compression.data.phrases import headings, key_phrases, sentences, title
from softbatch.prompt_store.compression.data.selection import Deduplicator, merge, split, surplus_recitations, usable
from softbatch.prompt_store.compression.data.self_study import model_questions, question_prompts, template_questions

EXAMPLES = Path(__file__).parents[3] / "examples"
CONTEXT = (EXAMPLES / "manual" / "context.md").read_text(encoding="utf-8")
PLAIN = " ".join(
    f"The device number {n} has a red lamp and must be cleaned every {n + 2} days. If the lamp blinks, call "
    f"the office in town {n}."
    for n in range(40)
)


def test_the_whole_context_is_covered_evenly() -> None:
    found = template_questions(CONTEXT, 400)
    assert len(found) == 400
    places = Counter(example.place for example in found)
    assert len(places) == 16
    assert max(places.values()) < 5 * min(places.values())
    assert len({example.kind for example in found}) >= 8
    first = Counter(example.place for example in found[:120])
    assert len(first) == 16, "a run that takes only the first questions covers the context, too"


@pytest.mark.parametrize("name", ["manual", "policy", "api"])
def test_hand_written_questions_are_not_in_the_templates(name: str) -> None:
    """The examples' questions are for measuring only."""
    context = (EXAMPLES / name / "context.md").read_text(encoding="utf-8")
    asked = {example.input for example in load_jsonl(EXAMPLES / name / "questions.jsonl")}
    assert not asked & {example.input for example in template_questions(context, 700)}


def test_deterministic_for_a_seed() -> None:
    assert template_questions(CONTEXT, 200, 5) == template_questions(CONTEXT, 200, 5)
    assert template_questions(CONTEXT, 200, 5) != template_questions(CONTEXT, 200, 6)


def test_plain_text_without_headings_works() -> None:
    assert headings(PLAIN) == []
    found = template_questions(PLAIN, 200)
    assert len(found) > 100
    assert all(example.input.strip() and "{" not in example.input for example in found)


def test_a_text_of_a_few_long_sentences_has_many_questions_too() -> None:
    """No headings, tables or short sentences: what is asked comes from key phrases and fragments."""
    text = " ".join(
        f"Whoever uses the licensed program number {n} in a court of the state, whether as an owner or on behalf of "
        f"another person, shall keep this notice in copy {n + 3}, together with the list of changes, the names of "
        f"their authors and the date on which each part was delivered to the registrar of town {n * 7}."
        for n in range(25)
    )
    found = template_questions(text, 3000)
    assert len(found) > 600
    assert sum(example.kind == "quote" for example in found) > 40, "more than one fragment of a long sentence"


@pytest.mark.parametrize(
    "text", ["x", "?!", "日本語のテキスト。" * 30, "| a | b |\n|---|---|\n", "# Only a title\n", "`" * 9]
)
def test_odd_contexts_do_not_break_it(text: str) -> None:
    for example in template_questions(text, 50):
        assert example.input.strip()
        assert 0 <= example.position < 1


@given(st.text(max_size=400))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_text_gives_valid_examples(text: str) -> None:
    for example in template_questions(text, 30):
        assert example.input.strip()
        assert example.output is None or example.output.strip()
        assert 0 <= example.position < 1


def test_phrases_and_sentences() -> None:
    assert title(CONTEXT).startswith("Merrowby WS-4")
    phrases = {phrase.lower() for phrase, _ in key_phrases(CONTEXT)}
    assert {"outdoor unit", "microsd card"} <= phrases
    assert all("|---" not in sentence.text for sentence in sentences(CONTEXT))


def test_passages_are_the_context_itself() -> None:
    pieces = passages(CONTEXT, 220)
    assert all(CONTEXT[at:].lstrip().startswith(text[:20]) for at, text in pieces)
    assert not any(line.startswith("#") for _, text in pieces for line in text.splitlines())
    covered = sum(len(text) for _, text in pieces)
    assert covered > 0.85 * len(CONTEXT)


def test_duplicates_echoes_and_empty_ones_are_dropped() -> None:
    kept = Deduplicator("# Acme Guide\n\nThe red lamp shows an error. Nothing else is known.")
    assert kept.add("What does the red lamp show in the Acme Guide?")
    assert not kept.add("What does the red lamp show?"), "the same but for the title"
    assert not kept.add("what does the RED lamp show in Acme Guide")
    assert not kept.add("The red lamp shows an error."), "an echo"
    assert not kept.add("   ")
    assert not kept.add("?")
    assert kept.add("Why is nothing known about the green lamp?")


def test_the_models_replies_are_cleaned() -> None:
    replies = [("1. What is the lamp for?\n2. What is the lamp for?\n3. No question.\n- Who made it?", 0.4), ("", 0.5)]
    found = model_questions("The lamp.", replies)
    assert [example.input for example in found] == ["What is the lamp for?", "Who made it?"]
    assert {example.source for example in found} == {"model"}
    positions = [position for _, position in question_prompts(CONTEXT, 10)]
    assert len(positions) == 10
    assert positions == sorted(positions)


def test_answers_that_are_empty_or_echo_are_unusable() -> None:
    assert usable(Example("What is it?", "A lamp."))
    assert not usable(Example("What is it?", "what is it"))
    assert not usable(Example("What is it?", " \n"))
    assert not usable(Example("What is it?"))


@given(st.integers(0, 1000), st.integers(4, 80), st.integers(0, 12))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_split_never_leaks(seed: int, held_out: int, user: int) -> None:
    own = template_questions(CONTEXT, 200, 1)
    mine = [Example(f"user question {n}", None, "fact", n / 20, "user") for n in range(user)]
    training, held = split([*mine, *own], held_out, seed)
    assert sorted(e.input for e in training + held) == sorted(e.input for e in [*mine, *own])
    assert all(example.source != "user" for example in held)
    assert training[: len(mine)] == mine
    cells = {(example.kind, example.place) for example in held}
    assert not cells & {(e.kind, e.place) for e in training if e.source != "user"}
    assert all(example.output is None for example in held), "recitations are for training"
    assert 0 < len(held) <= held_out + max(2, held_out // 6)


def test_split_spreads_over_kinds_and_places() -> None:
    training, held = split(template_questions(CONTEXT, 600), 40)
    assert len(held) >= 36
    assert len({e.kind for e in held}) >= 6
    assert len({e.place for e in held}) >= 8
    assert {e.place for e in training} == set(range(16))
    assert {e.kind for e in training} >= {e.kind for e in held}


def test_merge_keeps_the_users_questions_first() -> None:
    user = [Example("What does SET do on the console?"), Example("What does SET do on the console?")]
    own = [Example("What does SET do on the console", None, "fact", 0.1, "template"), *template_questions(CONTEXT, 50)]
    merged = merge(user, own, CONTEXT, 30)
    assert merged[:2] == user
    assert len(merged) == 30
    assert merged[2] != own[0]


def test_jsonl_round_trip(tmp_path: Path) -> None:
    examples = [
        Example("Über?", "Ja\n»x«", "fact", 0.25, "template", True),
        Example("Two?"),
        *random.Random(0).sample(template_questions(CONTEXT, 50), 10),
    ]
    save_jsonl(examples, tmp_path / "q.jsonl")
    assert [e.input for e in load_jsonl(tmp_path / "q.jsonl")] == [e.input for e in examples]
    assert load_jsonl(tmp_path / "q.jsonl")[:2] == examples[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not valid JSON"),
        ('"text"', "line 2: expected an object"),
        ('{"output": "x"}', "line 2: input must be a text"),
        ('{"input": "  "}', "line 2: input must be a text"),
        ('{"input": 5}', "line 2: input must be a text"),
        ('{"input": "x", "output": ""}', "line 2: output must be a text"),
        ('{"input": "x", "answer": "y"}', "line 2: unknown field 'answer'"),
        ('{"input": "x", "position": 3}', "line 2: position must be a number"),
        ('{"input": "x", "cut": 1}', "line 2: cut must be true or false"),
        ('{"input": "' + "x" * 20_001 + '"}', "line 2: input is longer"),
        ("[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"input": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_jsonl(path)


def test_empty_and_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="no questions"):
        load_jsonl(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_jsonl(path)


def test_a_third_of_the_recitations_is_trained_on() -> None:
    found = template_questions(CONTEXT, 400)
    surplus = surplus_recitations(found)
    recited = [index for index, example in enumerate(found) if example.kind == "recite"]
    assert set(surplus) < set(recited)
    assert len(surplus) == len(recited) * 2 // 3
    kept = {found[index].place for index in recited if index not in surplus}
    assert len(kept) >= 12, "those that stay are spread over the context"
