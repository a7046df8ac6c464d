"""What cannot be done is refused before any work is done, by name and with what would be right."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from softbatch.prompt_store.compression.compression_settings import CompressionSettings
from softbatch.prompt_store.compression.data.examples import Example
from softbatch.prompt_store.manifest import Manifest, ModelRef
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, save
from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.server.compressions.checks import check_room
from softbatch.server.compressions.request import InputError, ModelShape, read_questions
from softbatch.server.compressions.run_directory import locked
from tests.server.compressions.conftest import CONTEXT, Run
from tests.support.servers import running_server


def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "good.md": CONTEXT.encode(),
        "empty.md": b" \n\t\n",
        "binary.md": b"\x7fELF\x02\x01\x00\x00" + bytes(range(256)),
        "nul.md": b"text\0text",
        "latin.md": "Grüße".encode("latin-1"),
        "broken.jsonl": b'{"input": "When?"}\n\n{"input": "Where?"\n',
        "wrong.jsonl": b'{"input": "When?"}\n{"question": "Where?"}\n',
        "blank.jsonl": b'{"input": "When?"}\n{"input": "Why?"}\n{"input": "  "}\n',
        "number.jsonl": b'{"input": 5}\n',
        "none.jsonl": b"\n",
        "good.jsonl": b'{"input": "When does it open?"}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "empty context": ("empty.md", [], ["empty.md", "empty"]),
    "binary context": ("binary.md", [], ["binary.md", "not a UTF-8 text file"]),
    "NUL in the context": ("nul.md", [], ["nul.md", "NUL"]),
    "another encoding": ("latin.md", [], ["latin.md", "byte 2", "UTF-8"]),
    "no such context": ("missing.md", [], ["missing.md", "No such file"]),
    "a directory as context": (".", [], ["directory"]),
    "broken line": ("good.md", ["--questions", "broken.jsonl"], ["broken.jsonl, line 3", "not valid JSON"]),
    "unknown field": ("good.md", ["--questions", "wrong.jsonl"], ["wrong.jsonl, line 2", "question"]),
    "blank question": ("good.md", ["--questions", "blank.jsonl"], ["blank.jsonl, line 3", "input"]),
    "question that is a number": ("good.md", ["--questions", "number.jsonl"], ["number.jsonl, line 1", "input"]),
    "no questions": ("good.md", ["--questions", "none.jsonl"], ["none.jsonl", "no questions"]),
    "no such questions": ("good.md", ["--questions", "missing.jsonl"], ["missing.jsonl", "No such file"]),
    "invalid name": ("good.md", ["--name", "../up"], ["name", "letter or digit"]),
    "taken name": ("good.md", ["--name", "taken"], ["taken", "exists already"]),
    "unknown objective": ("good.md", ["--objective", "mse"], ["objective", "kl, nll, mixed"]),
    "unknown kind": ("good.md", ["--kind", "lora"], ["kind", "kv or embeddings"]),
    "too many virtual tokens": (
        "good.md",
        ["--virtual-tokens", "500"],
        ["500 virtual tokens", "more than the context's"],
    ),
    "too few virtual tokens": ("good.md", ["--virtual-tokens", "1"], ["virtual_tokens", "between 2 and"]),
    "alpha": ("good.md", ["--objective", "mixed", "--alpha", "1.5"], ["alpha", "[0, 1]"]),
    "no time": ("good.md", ["--minutes", "0"], ["minutes", "between 0 and"]),
    "no steps": ("good.md", ["--steps", "0"], ["steps", "between 1 and"]),
    "seed": ("good.md", ["--seed", "-1"], ["seed", "between 0 and"]),
    "long instruction": ("good.md", ["--instruction", "x" * 5000], ["instruction", "4096"]),
    "report is a file": ("good.md", ["--report", "good.jsonl"], ["--report", "not a directory"]),
    "report below a file": ("good.md", ["--report", "good.jsonl/in/it"], ["--report", "not a directory"]),
    "alpha without mixed": ("good.md", ["--alpha", "0.3"], ["--alpha", "--objective mixed"]),
    "answer tokens": ("good.md", ["--answer-tokens", "2"], ["max_answer_tokens", "between 4 and"]),
    "model questions": ("good.md", ["--model-questions", "-1"], ["model_questions", "between 0 and"]),
    "no room for answers": ("good.md", ["--answer-tokens", "2000"], ["answer_tokens: 2000", "window of 2048"]),
    "the server's own file": ("good.md", ["--name", "lock"], ["--name", "lock"]),
    "no room in the window": (
        "good.md",
        ["--virtual-tokens", "1700"],
        ["1700 virtual tokens", "window of 2048 tokens; 1616 are the most"],
    ),
    "no such model": ("good.md", ["--model", "./nowhere"], ["--model ./nowhere"]),
    "no server": (
        "good.md",
        ["--server", "http://127.0.0.1:9"],
        ["--server http://127.0.0.1:9", "is the server running?"],
    ),
    "a preview for a server": (
        "good.md",
        ["--preview", "--server", "http://127.0.0.1:9"],
        ["--preview with --server", "POST /v1/compressions"],
    ),
    "not an address": ("good.md", ["--server", "localhost"], ["--server localhost", "http://"]),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_compress_refuses(
    case: str, command: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, flags, expected = CASES[case]
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    add_prompt(tmp_path / "store", "taken")
    before = tree(tmp_path)
    status = command("compress", context, "--name", "harbour", *flags)
    error = capfd.readouterr().err
    assert status == 2
    assert error.startswith("softbatch compress: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for part in expected:
        assert part in error, error
    assert tree(tmp_path) == before


def test_the_models_own_name_is_taken(
    command: Run, context_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("compress", context_file, "--name", "tiny-llama", "--virtual-tokens", "8") == 2
    assert "tiny-llama is the model's own name" in capfd.readouterr().err
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_the_server_is_asked_before_any_work_is_done(
    command: Run, context_file: Path, tiny_path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", tiny_path, "--dtype", "float32", "--kv-cache-gib", "0.01", "--max-prompt-mib", "1")
    with running_server(tmp_path, *flags) as server:
        cases = {"tiny-llama": ((), "the model's own name"), "large": (("--virtual-tokens", "70"), "1 MiB that a soft")}
        for name, (more, message) in cases.items():
            assert command("compress", context_file, "--server", server.url, "--name", name, *more) == 2
            assert message in capfd.readouterr().err


def tree(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*")}


def add_prompt(store: Path, name: str, model: str = "other") -> None:
    import torch

    manifest = Manifest(
        kind="embeddings",
        num_virtual_tokens=2,
        model=ModelRef(name=model, fingerprint="0" * 64),
        replaces="system",
        source="test",
        created_at=1_700_000_000,
    )
    path = store.parent / "made.safetensors"
    save(SoftPrompt(manifest, embeddings=torch.zeros(2, 4)), path)
    PromptStore(store, 1 << 20).add(name, path)
    path.unlink()


def test_a_soft_prompt_larger_than_the_store_or_the_disk(tmp_path: Path) -> None:
    small = ModelShape(num_layers=3, num_kv_heads=2, head_dim=8, hidden_size=64)
    check_room(tmp_path / "not" / "there", small, CompressionSettings(), (), 256 << 20)
    with pytest.raises(InputError) as refused:
        check_room(tmp_path, small, CompressionSettings(virtual_tokens=20_000), (), 8 << 20)
    assert refused.value.code == "too_large"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    vast = ModelShape(num_layers=free // 1024, num_kv_heads=8, head_dim=64, hidden_size=64)
    with pytest.raises(InputError, match="not enough disk space") as refused:
        check_room(tmp_path, vast, CompressionSettings(), (), 1 << 60)
    assert refused.value.code == "disk_full"


def test_the_users_own_questions_take_room_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape(num_layers=3, num_kv_heads=2, head_dim=8, hidden_size=1 << 14)
    settings = CompressionSettings(questions=0, held_out=4, max_answer_tokens=16)
    own = (Example("When?", "At seven."),) * 100
    states = 2 * 4 * shape.hidden_size * settings.max_answer_tokens * len(own)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=states))
    check_room(tmp_path, shape, settings, (), 1 << 30)
    with pytest.raises(InputError, match="not enough disk space"):
        check_room(tmp_path, shape, settings, own, 1 << 30)
    long = (Example("When?", "x" * 20_000),) * 5
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40 << 20))
    check_room(tmp_path, shape, settings, long[:1], 1 << 30)
    with pytest.raises(InputError, match="not enough disk space"):
        check_room(tmp_path, shape, settings, long * 100, 1 << 30)


def test_two_runs_of_one_name(
    command: Run, context_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "store" / ".compressions" / "harbour"):
        assert command("compress", context_file, "--name", "harbour", "--virtual-tokens", "8") == 2
    assert "another process is compressing under this name" in capfd.readouterr().err


def test_unfinished_work_is_not_thrown_away(
    command: Run, context_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "store" / ".compressions" / "harbour" / "work"
    work.mkdir(parents=True)
    (work / "train.jsonl").write_text(json.dumps({"input": "When?", "output": "At seven."}))
    assert command("compress", context_file, "--name", "harbour", "--virtual-tokens", "8") == 2
    assert "--resume" in capfd.readouterr().err
    assert (work / "train.jsonl").exists()


def test_a_file_that_a_run_left_behind_counts_as_the_users_own(tmp_path: Path) -> None:
    """Its questions are trained on and never held out, wherever they came from."""
    line = {"input": "When?", "output": "At seven.", "kind": "fact", "position": 0.5, "source": "template", "cut": True}
    (tmp_path / "train.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (question,) = read_questions(tmp_path / "train.jsonl")
    assert (question.input, question.output, question.position) == ("When?", "At seven.", 0.5)
    assert (question.source, question.kind, question.cut) == ("user", "user", False)


@pytest.mark.parametrize(
    ("source", "accept"),
    [("model", ()), ("template", ()), ("user", ("seven",)), ("faq", ("seven",)), (None, ("seven",))],
)
def test_passages_that_a_run_showed_and_what_it_accepted_are_not_the_users(
    source: str | None, accept: tuple[str, ...], tmp_path: Path
) -> None:
    """A passage is not checked against the model's window, and a question with right answers is not trained on."""
    line = {"input": "When?", "accept": ["seven"], "source": source, "passage": "The ferry leaves at seven. " * 700}
    (tmp_path / "train.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (question,) = read_questions(tmp_path / "train.jsonl")
    assert (question.asked, question.accept) == ("When?", accept)


EVALUATE: dict[str, tuple[list[str], list[str]]] = {
    "unknown prompt": (["nobody", "--context", "good.md", "--questions", "good.jsonl"], ["nobody"]),
    "broken line": (["taken", "--context", "good.md", "--questions", "broken.jsonl"], ["broken.jsonl, line 3"]),
    "empty context": (["taken", "--context", "empty.md", "--questions", "good.jsonl"], ["empty.md"]),
    "another model's": (["taken", "--context", "good.md", "--questions", "good.jsonl"], ["was made for model other"]),
}


@pytest.mark.parametrize("case", sorted(EVALUATE))
def test_evaluate_refuses(
    case: str, command: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, expected = EVALUATE[case]
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    add_prompt(tmp_path / "store", "taken")
    assert command("evaluate", *flags) == 2
    error = capfd.readouterr().err
    for part in ["softbatch evaluate: ", *expected]:
        assert part in error, error


SCORE: dict[str, tuple[list[str], list[str]]] = {
    "unknown prompt": (["--input", "x", "--candidate", "y", "--soft-prompt", "nobody"], ["nobody"]),
    "another model's": (["--input", "x", "--candidate", "y", "--soft-prompt", "taken"], ["was made for model other"]),
    "empty context": (["--input", "x", "--candidate", "y", "--context", "empty.md"], ["empty.md"]),
    "too many": (["--input", "x", *["--candidate", "y"] * 300], ["--candidate", "256"]),
    "no server": (["--input", "x", "--candidate", "y", "--server", "http://127.0.0.1:9"], ["is the server running?"]),
}


@pytest.mark.parametrize("case", sorted(SCORE))
def test_score_refuses(
    case: str, command: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, expected = SCORE[case]
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    add_prompt(tmp_path / "store", "taken")
    assert command("score", *flags) == 2
    error = capfd.readouterr().err
    for part in ["softbatch score: ", *expected]:
        assert part in error, error
