"""Training beside passages: which pairs are seen once more, with which passages, and what their teacher is."""

from __future__ import annotations

import torch

from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.passage_index import PassageIndex
from softbatch.prompt_store.compression.data.passages import before_question
from softbatch.prompt_store.compression.frozen.tokenized_context import TokenizedContext
from softbatch.prompt_store.compression.training.hidden_states import TeacherOutputs
from softbatch.prompt_store.compression.training.visibility import with_passages
from tests.support.models import Reference

TEXT = "# Lamps\n\n" + "\n\n".join(
    f"## Part {name}\n\nThe {name} lamp has {n + 2} bulbs and must be cleaned every {n * 3 + 40} days, which takes an "
    f"hour. If the {name} lamp blinks, hold its button for {n + 5} seconds, then call the office in {name}ville."
    for n, name in enumerate(("red", "green", "blue", "white", "violet", "amber"))
)


def context(llama: Reference, window: int = 4096) -> TokenizedContext:
    return TokenizedContext(llama.tokenizer, TEXT, None, 8, window)


def examples() -> list[Example]:
    passages = PassageIndex(TEXT).passages
    return [
        Example(
            f"How often must the {name} lamp be cleaned?",
            f"every {n * 3 + 40} days",
            "detail",
            0.1,
            "model",
            accept=(f"{n * 3 + 40} days",),
            passage=next(one.text for one in passages if f"{name} lamp has" in one.text),
        )
        for n, name in enumerate(("red", "green", "blue", "white", "violet", "amber") * 3)
    ]


def test_a_quarter_is_seen_beside_passages_as_serving_writes_them(llama: Reference) -> None:
    asked, text = examples(), context(llama)
    pairs = [text.renderer.pair(example, text.segments, 8) for example in asked]
    teacher = TeacherOutputs([torch.full((len(pair.answer), 2), float(n)) for n, pair in enumerate(pairs)], [])
    found, outputs = with_passages(pairs, teacher, asked, text, 2, 4)
    assert found[: len(pairs)] == pairs
    assert 4 * (len(found) - len(pairs)) == len(found)
    index, wrong = PassageIndex(TEXT), 0
    for number, pair in enumerate(found[len(pairs) :]):
        at = 3 * number + 2
        assert pair.answer == pairs[at].answer
        assert torch.equal(outputs.states[len(pairs) + number], teacher.states[at])
        served = text.renderer.question(before_question(index.best(asked[at].input, 2), asked[at].input))
        shown = text.renderer.text(pair.prompt)
        if list(pair.prompt) != served:
            wrong += 1
            assert asked[at].passage not in shown
            assert asked[at].accept[0] not in shown
        else:
            assert asked[at].passage in shown
    assert 3 * wrong == len(found) - len(pairs)


def test_no_pair_is_made_that_the_window_has_no_room_for(llama: Reference) -> None:
    asked, text = examples(), context(llama)
    pairs = [text.renderer.pair(example, text.segments, 8) for example in asked]
    text.window = 40
    found, _ = with_passages(pairs, TeacherOutputs([torch.zeros(1, 2)] * len(pairs), []), asked, text, 2, 4)
    assert found == pairs


def test_the_teacher_reads_the_passage_and_the_student_does_not(llama: Reference) -> None:
    asked, text = examples()[0], context(llama)
    pair = text.renderer.pair(asked, text.segments, 8)
    assert list(pair.prompt) == text.renderer.question(asked.input)
    assert list(pair.of_teacher.prompt) == text.renderer.question(f"{asked.passage}\n\n{asked.input}")
    assert pair.of_teacher.answer == pair.answer
