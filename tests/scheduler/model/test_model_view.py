"""A model's directory with some of its texts changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from softbatch.scheduler.model.model_files import load_tokenizer
from softbatch.scheduler.model.model_view import CHAT_TEMPLATE, MAX_TEMPLATE_BYTES, with_chat_template, without_marks
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, ModelError, resolve
from tests.support.families import save_family

QUESTION = [{"role": "user", "content": "Why?"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<to>{% endif %}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("view") / "llama", resolve(EMBEDDED_ALIAS).path)


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    return file


def test_other_texts_with_a_byte_order_mark_need_no_copy(directory: Path, tmp_path: Path) -> None:
    (directory / "LICENSE.txt").write_bytes(b"\xef\xbb\xbfAnybody may use it.")
    (directory / "merges.txt").symlink_to("/proc/self/mem")  # whose first read fails, whoever asks
    assert without_marks(directory, tmp_path / "cache") == directory


def test_a_copy_without_marks_is_whole(directory: Path, tmp_path: Path) -> None:
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (directory / "config.json").write_bytes(b"\xef\xbb\xbf" + (directory / "config.json").read_bytes())
    (tmp_path / "cache" / ".view-killed").mkdir(parents=True)
    copy = without_marks(directory, tmp_path / "cache")
    assert {entry.name for entry in copy.iterdir()} == {entry.name for entry in directory.iterdir()}
    assert (copy / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert list((tmp_path / "cache").iterdir()) == [copy]


@pytest.mark.parametrize("own", ["none", "in the config", "a file", "a list", "one for tools"])
def test_a_chat_template_stands_in_for_the_models(own: str, directory: Path, template: Path, tmp_path: Path) -> None:
    config = directory / "tokenizer_config.json"
    content = json.loads(config.read_text())
    content.pop("chat_template", None)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    if own == "in the config":
        content["chat_template"] = "{{ messages }}"
    elif own == "a list":
        content["chat_template"] = [{"name": name, "template": "{{ messages }}"} for name in ("default", "tool_use")]
    elif own != "none":
        (directory / "chat_template.jinja").write_text("{{ messages }}")
    if own == "one for tools":
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    config.write_text(json.dumps(content))
    view = with_chat_template(directory, tmp_path / "cache", template)
    tokenizer = load_tokenizer(str(view))
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        text = tokenizer.apply_chat_template(QUESTION, tools=tools, tokenize=False, add_generation_prompt=True)
        assert text == "<user>Why?<to>"


def test_a_running_server_keeps_the_template_it_began_with(directory: Path, template: Path, tmp_path: Path) -> None:
    view = with_chat_template(directory, tmp_path / "cache", template)
    assert with_chat_template(directory, tmp_path / "cache", template) == view
    template.write_text(TEMPLATE.replace("<to>", "<now>"))
    assert with_chat_template(directory, tmp_path / "cache", template) != view
    assert (view / CHAT_TEMPLATE).read_text() == TEMPLATE


def test_it_stands_in_for_a_gguf_files_too(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(template.parent)
    source = resolve(EMBEDDED_ALIAS, chat_template=template.name)
    assert (source.tokenizer.chat_template, source.name) == (TEMPLATE, EMBEDDED_ALIAS)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "No such file or directory; give a file with a Jinja template"),
        (b"{% for m in messages %}\n{{ m.content }", "line 2: "),
        (b"Hello", "it never reads `messages`"),
        (b"messages \xff", "not UTF-8 text"),
        (b"{{ messages }}" + bytes(MAX_TEMPLATE_BYTES), "larger than 1 MiB"),
    ],
)
def test_what_is_no_template_is_refused(content: bytes | None, part: str, directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrong.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError) as refused:
        resolve(str(directory), chat_template=str(file))
    message = str(refused.value)
    assert part in message
    assert str(file) in message
    assert "\n" not in message


def test_a_template_may_refuse_some_chats(directory: Path, tmp_path: Path) -> None:
    """It is asked to show one when it is read; what it says against that one is no fault."""
    file = tmp_path / "strict.jinja"
    file.write_text("{{ raise_exception('no') if messages[0].role != 'system' else messages[1].content }}")
    assert with_chat_template(directory, tmp_path / "cache", file).is_dir()
