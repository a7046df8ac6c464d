"""Contexts of any script: sentences, questions without English around them, coverage, the document's own questions."""

from __future__ import annotations

import random
import re
import time

import pytest

from softbatch.prompt_store.compression.data import language
from softbatch.prompt_store.compression.data.coverage import coverage
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.compression.data.language import is_english, question_mark, split_sentences
from softbatch.prompt_store.compression.data.passages import passages
from softbatch.prompt_store.compression.data.phrases import sentences
from softbatch.prompt_store.compression.data.questions import neutral_questions, own_questions, questions_from
from softbatch.prompt_store.compression.data.selection import merge, split
from softbatch.prompt_store.compression.data.self_study import model_questions, template_questions

CHINESE = (
    "港务局早上七点开门，进门前请敲两次铜铃。超过十二米的船每晚付三十克朗。红旗表示任何船只都不得离港！"
    "冬天码头的水管会关闭。钥匙放在灯塔旁边的蓝色箱子里。周日只有救生艇值班。渔民可以在北码头卸货吗？可以，但要在中午之前。"
    "雾天请打开航行灯并降低速度。电话号码写在门上。"
)
JAPANESE = (
    "港の事務所は七時に開きます。入る前に鐘を二度鳴らしてください。長さ十二メートルを超える船は一晩三十クローネを払います。"
    "赤い旗は出港禁止を意味します。冬は桟橋の水道が止まります。鍵は灯台の横の青い箱にあります。"
)
THAI = (
    "สำนักงานท่าเรือเปิดเจ็ดโมงเช้า กรุณาสั่นกระดิ่งสองครั้งก่อนเข้า เรือที่ยาวกว่าสิบสองเมตรต้องจ่ายสามสิบคราวน์ต่อคืน "
    "ธงแดงหมายความว่าห้ามเรือออกจากท่า ในฤดูหนาวน้ำประปาที่ท่าเรือจะปิด กุญแจอยู่ในกล่องสีน้ำเงินข้างประภาคาร"
)
HINDI = (
    "बंदरगाह कार्यालय सुबह सात बजे खुलता है। अंदर आने से पहले पीतल की घंटी दो बार बजाएँ। "
    "बारह मीटर से लंबी नावें हर रात तीस क्राउन देती हैं। "
    "लाल झंडे का मतलब है कि कोई नाव नहीं जा सकती। चाबी नीले डिब्बे में है।"
)
ARABIC = (
    "يفتح مكتب الميناء في السابعة صباحا. اقرع الجرس النحاسي مرتين قبل الدخول. "
    "هل يمكن للصيادين التفريغ في الرصيف الشمالي؟ "
    "نعم، ولكن قبل الظهر. العلم الأحمر يعني أنه لا يجوز لأي قارب المغادرة."
)
GERMAN = (
    "Das Hafenamt öffnet um sieben Uhr. Läuten Sie zweimal, bevor Sie eintreten. Boote über zwölf Meter zahlen dreißig "
    "Kronen je Nacht. Rote Fahnen bedeuten, dass kein Boot auslaufen darf. "
    "Im Winter ist das Wasser am Steg abgestellt. "
    "Der Schlüssel liegt im blauen Kasten neben dem Leuchtturm."
)
TEXTS = {"zh": CHINESE, "ja": JAPANESE, "th": THAI, "hi": HINDI, "ar": ARABIC, "de": GERMAN}
COUNTS = {"zh": 10, "ja": 6, "th": 4, "hi": 5, "ar": 5, "de": 6}
ENGLISH_WORDS = re.compile(r"\b(what|the|does|explain|document|about|why|how|tell)\b", re.IGNORECASE)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_sentences_end_where_their_script_says(name: str) -> None:
    assert len(sentences(TEXTS[name])) == COUNTS[name]
    assert not is_english(TEXTS[name])


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_sentence_is_asked_about_in_its_own_words(name: str) -> None:
    text = TEXTS[name]
    made = template_questions(text, 400)
    assert not [example.input for example in made if ENGLISH_WORDS.search(example.input)]
    assert any(example.kind == "recite" for example in made)
    assert all(example.kind != "general" for example in made), "nothing is asked about nothing"
    training, held_out = split(merge([], made, text, 400), 32)
    assert held_out
    found = coverage(text, training)
    assert found["asked"] == found["sentences"] == COUNTS[name]


@pytest.mark.parametrize(
    "text",
    [
        "ከመግባትዎ በፊት ደወሉን ሁለት ጊዜ ይደውሉ።",
        "Մուտք գործելուց առաջ երկու անգամ զանգահարեք։",
        "اندر آنے سے پہلے گھنٹی دو بار بجائیں۔",
    ],
    ids=["am", "hy", "ur"],
)
def test_a_question_has_one_mark_at_its_end(text: str) -> None:
    asked = [question for question, _, _ in neutral_questions(sentences(text))]
    assert asked[0] == text[:-1] + question_mark(text)
    assert not [question for question in asked if text[-1] in question]


def test_a_short_text_in_plain_letters_may_be_in_another_language() -> None:
    dutch = "Het havenkantoor gaat om zeven uur open. Bel twee keer voordat u binnenkomt. De sleutel ligt in de kist."
    assert not is_english(dutch)
    assert not [example.input for example in template_questions(dutch, 60) if ENGLISH_WORDS.search(example.input)]
    assert is_english("Ring the bell twice. Boats longer than twelve metres pay thirty crowns each night.")
    assert is_english("Ring twice. Pay thirty crowns.")


def test_the_documents_own_questions_are_asked() -> None:
    text = "# Harbour\n\n## Who may moor here?\n\nMay I bring a dog? Yes, on a lead. The office is open at seven.\n"
    own = {question for question, _, _ in own_questions(sentences(text), text)}
    assert own == {"Who may moor here?", "May I bring a dog?"}
    assert own <= {example.input for example in merge([], template_questions(text, 60), text, 60)}
    arabic = {question for question, _, _ in own_questions(sentences(ARABIC), ARABIC)}
    assert arabic == {"هل يمكن للصيادين التفريغ في الرصيف الشمالي؟"}
    assert question_mark(ARABIC) == "؟"
    assert question_mark("Open at seven") == question_mark(HINDI) == "?"


def test_parts_in_another_script_get_no_english_around_them() -> None:
    english = "The harbour office is open at seven. You must ring the bell if the door is closed. " * 3
    asked = [question for question, _, _ in questions_from(english + CHINESE, random.Random(0))]
    chinese = [question for question in asked if re.search(r"[\u4e00-\u9fff]", question)]
    assert chinese
    assert not [question for question in chinese if ENGLISH_WORDS.search(question)]


def test_statements_become_whole_questions() -> None:
    """No pronoun without its noun, no clause that is cut, no question word that does not go with the verb."""
    text = (
        "The bell must be rung twice before a visitor enters. "
        "It is made of brass. The harbour master can close the gate. "
        "The gate that is closed must stay closed. Red flags are a warning."
    )
    asked = {q for q, kind, _ in questions_from(text, random.Random(1)) if kind == "fact"}
    rewritten = {
        q for q in asked if re.match(r"(?:How|Why|When|In what case)?\s?(?:must|can|is|are)\b", q, re.IGNORECASE)
    }
    assert any("the harbour master close the gate?" in question for question in rewritten)
    assert not [question for question in rewritten if " it " in question or question.startswith("How are")]
    assert not [question for question in asked if re.search(r"\b(?:in|for|with|of) Harbour\?$", question)]


def test_the_models_questions_are_in_the_texts_language() -> None:
    replies = [("1. 港务局几点开门？\n2. What is the harbour?\n3. 红旗表示什么？钥匙在哪里？", 0.1)]
    assert [e.input for e in model_questions(CHINESE, replies)] == [
        "港务局几点开门？",
        "红旗表示什么？",
        "钥匙在哪里？",
    ]
    replies = [("Wann öffnet das Hafenamt? What does the flag mean? Wer darf auslaufen?", 0.1)]
    assert [e.input for e in model_questions(GERMAN, replies)] == ["Wann öffnet das Hafenamt?", "Wer darf auslaufen?"]


def test_quotes_and_abbreviations_do_not_end_sentences() -> None:
    assert split_sentences("他说：「好。」然后走了。") == ["他说：「好。」", "然后走了。"]
    assert split_sentences("See e.g. the note. Then go on.") == ["See e.g. the note.", "Then go on."]
    assert coverage(CHINESE, [Example("全部？", None, "general")])["asked"] == 0


@pytest.mark.parametrize("part", ["a", "。", ")", "” ", "ก", "ก ์", ". )", "่"])
def test_odd_texts_cost_no_more_than_others(part: str) -> None:
    text = part * 20_000
    began = time.process_time()
    assert split_sentences(text)
    passages(text, 60)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", [CHINESE, GERMAN])
def test_a_text_is_read_once_for_all_that_the_model_asks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(language, "is_latin", lambda given, real=language.is_latin: read.append(given) or real(given))
    asked = [(f"- Who may leave at {hour}?\n- 谁可以在{hour}点出港？", 0.5) for hour in range(50)]
    assert len(model_questions(text, asked)) <= 50
    assert read.count(text) <= 2, "its script, and the script again for whether it is English"


def test_coverage_is_told_by_place() -> None:
    text = "".join(f"The {name} lamp is cleaned by hand.\n\n" for name in ("red", "green", "blue", "white"))
    found = coverage(text, [Example("By whom?", position=0.5, source="template", kind="fact")] * 3)
    assert (found["sentences"], found["asked"], found["asked_often"]) == (4, 1, 1)
    assert sum(row["sentences"] for row in found["by_place"].values()) == 4
    assert [place for place, row in found["by_place"].items() if row["asked_often"]] == ["25 to 50 %"]
