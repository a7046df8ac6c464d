"""What a text says exactly: what is asked for, in any language, and with which answer."""

from __future__ import annotations

import pytest

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.facts import GAP, KIND, Fact, fact_questions, facts_of
from softbatch.prompt_store.compression.data.phrases import sentences
from softbatch.prompt_store.compression.data.selection import fewest, mixed, split, spread_first, unasked

TEXT = """# Tidewater tool, version 2

Tidewater copies folders between harbours. Run it with `--dry-run` first; `from` is where the copy comes from.

| Code | Meaning |
|---|---|
| E7 | disk full |

A copy may take 90 minutes, and an operator of Port Anvers must not stop it. It never follows links.
"""


def answers(text: str) -> list[str]:
    return sorted(fact.answer for fact in facts_of(text))


def test_numbers_options_cells_and_names_are_asked_for() -> None:
    found = answers(TEXT)
    assert {"--dry-run", "E7", "disk full", "90 minutes", "Port Anvers"} <= set(found)
    assert "" in found, "a sentence without any of them is asked about as a whole"
    assert not {"Code", "Meaning", "from"} & set(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Das Freibad öffnet um 9:30 Uhr. Der Eintritt kostet 4,50 € für Erwachsene.", {"9:30 Uhr", "4,50"}),
        ("图书馆上午9点开放。押金为100元，最多可借5本书。", {"100元", "5"}),
        ("Библиотека открыта до 20 часов. Залог составляет 300 рублей.", {"20 часов", "300 рублей"}),
    ],
)
def test_facts_of_any_language_are_found(text: str, expected: set[str]) -> None:
    assert expected <= {one for fact in facts_of(text) for one in fact.accept("")}


def test_every_sentence_has_a_fact_and_every_beginning_is_spread() -> None:
    text = "".join(f"# Part {n}\n\nThe {n}th lamp has {n + 2} bulbs of type Q{n}.\n\n" for n in range(1, 33))
    found = facts_of(text)
    assert {fact.sentence.text for fact in found} == {sentence.text for sentence in sentences(text)}
    assert len({int(4 * fact.sentence.position) for fact in found[:8]}) == 4


def fact(answer: str) -> Fact:
    return next(found for found in facts_of(TEXT) if found.answer == answer)


def test_what_is_no_question_becomes_a_gap() -> None:
    minutes = fact("90 minutes")
    (asked,) = fact_questions(TEXT, [(minutes, "1. How long may a copy take?\n2. Why?")])
    assert (asked.kind, asked.source, asked.output) == (KIND, "model", None)
    assert asked.input.endswith("How long may a copy take?")
    assert asked.accept[:2] == ("90 minutes", "90")
    assert "90 minutes" in asked.passage
    assert asked.asked.startswith(asked.passage)
    for reply in ("It takes long.", ""):
        (gap,) = fact_questions(TEXT, [(minutes, reply)])
        assert (gap.kind, gap.output) == (GAP, minutes.sentence.text)
        assert "90 minutes" not in gap.input
    assert fact_questions(TEXT, [(fact(""), "no question")]) == []


def test_an_answer_may_be_another_fact_of_the_passage_but_none_that_the_question_holds() -> None:
    (asked,) = fact_questions(TEXT, [(fact("90 minutes"), "Who must not stop a copy of 90 minutes?")])
    assert "Port Anvers" in asked.accept
    assert not {"90 minutes", "90"} & set(asked.accept)


def test_facts_are_neither_held_out_nor_observed_and_mixed_in_by_share() -> None:
    plain = [Example(f"question {n}", kind=f"k{n % 4}", position=n / 40, source="template") for n in range(40)]
    facts = [Example(f"fact {n}", kind=KIND, position=n / 10, source="model", passage="p") for n in range(10)]
    both = mixed(facts, plain, 0.5)
    assert sorted(e.input for e in both) == sorted(e.input for e in plain + facts)
    assert sum(bool(e.passage) for e in both[:10]) == 5
    assert not any(e.passage for e in split(both, 8)[1])
    assert not any(e.passage for e in spread_first(both, 30)[:30])
    assert mixed(facts, plain, 0.0)[:40] == plain


def test_no_fact_is_what_another_question_asks_and_facts_of_one_sentence_stay() -> None:
    def detail(text: str) -> Example:
        return Example(text, kind=KIND, source="model", passage="p")

    gaps = [detail(f"Port hours: It opens at {a} and closes at {b} on most days of the year.") for a, b in ("…9", "8…")]
    alike = detail("How many minutes may a copy between two harbours take, please?")
    others = [Example("Why?"), Example("How many minutes may a copy between two harbours take?"), Example("Who calls?")]
    assert unasked([alike, *gaps], others, TEXT) == gaps
    assert unasked([alike, detail("Why?")], others[:1], TEXT) == [alike]


def test_facts_leave_as_many_others_as_are_to_be_held_out() -> None:
    recited = Example("recite", output="all of it", kind="recite", source="template")
    others = [
        one
        for n in range(60)
        for one in (Example(f"question {n}", kind=f"k{n % 3}", position=n / 60, source="template"), recited)
    ]
    for held_out in (4, 8):
        enough = others[: fewest(others, held_out)]
        assert len(split(enough, held_out)[1]) >= held_out
        assert len(enough) == 6 * held_out - 1
    assert fewest(others, 1000) == len(others)
