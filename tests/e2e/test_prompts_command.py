"""`softbatch prompts`: the soft prompts of a store, without a server, or beside one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from softbatch.prompt_store.manifest import ModelSpec
from softbatch.server.cli.main import main
from tests.support.models import Reference, make_soft_prompt, save_prompt
from tests.support.servers import Server, check_refusal


@pytest.fixture
def store(tmp_path: Path, no_settings: pytest.MonkeyPatch) -> Path:
    no_settings.setenv("SOFTBATCH_PROMPT_STORE", str(tmp_path / "prompts"))
    return tmp_path / "prompts"


def prompts(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status = main(["prompts", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_list_show_import_export_remove(
    store: Path, tiny_spec: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"no soft prompts in {store}" in prompts(capsys, "list")
    prompt = make_soft_prompt("kv", 9, tiny_spec, replaces="system")
    path = save_prompt(prompt, tmp_path, "prompt")
    assert prompts(capsys, "import", str(path), "--name", "manual") == "manual: 9 virtual tokens, kind kv\n"
    assert (store / "manual.safetensors").read_bytes() == path.read_bytes()
    header, row = prompts(capsys, "list").splitlines()
    assert header.split() == ["NAME", "KIND", "VIRTUAL", "CONTEXT", "SIZE", "MODEL", "CREATED", "VERDICT"]
    assert row.split()[:3] == ["manual", "kv", "9"]
    summary = dict(line.split("  ", 1) for line in prompts(capsys, "show", "manual").splitlines())
    assert summary["virtual tokens"].strip() == "9"
    assert summary["file"].strip() == str(store / "manual.safetensors")
    shown = json.loads(prompts(capsys, "show", "manual", "--json"))
    assert shown["name"] == "manual"
    assert shown["model"]["fingerprint"] == tiny_spec.fingerprint
    assert shown["replaces"] == "system"
    target = tmp_path / "exported.safetensors"
    prompts(capsys, "export", "manual", str(target))
    assert target.read_bytes() == path.read_bytes()
    prompts(capsys, "remove", "manual")
    assert "no soft prompts" in prompts(capsys, "list")
    assert not list(store.glob("*.safetensors"))


@pytest.mark.parametrize("verdict", ["good: \x1b[31m0.9\r\n\x85rm -rf \u2028\u202e", "x" * 9000, {"a": 1}, 7, None])
def test_what_an_imported_file_says_stays_in_its_row(
    store: Path, tiny_spec: ModelSpec, capsys: pytest.CaptureFixture[str], verdict: Any
) -> None:
    prompt = make_soft_prompt("kv", 2, tiny_spec, replaces="system")
    odd = {"fidelity": {"verdict": verdict}, "source": "a\nb\x1b"}
    prompt = replace(prompt, manifest=prompt.manifest.model_copy(update=odd))
    store.mkdir()
    save_prompt(prompt, store, "odd")
    _, row, end = prompts(capsys, "list").split("\n")
    assert row.isprintable()
    assert len(row) < 250
    assert end == ""
    assert all(line.isprintable() for line in prompts(capsys, "show", "odd").split("\n"))


def test_import_of_a_peft_folder(
    store: Path,
    tiny_llama: Reference,
    tiny_spec: ModelSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.path, dtype=torch.float32)
    adapter = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=11))
    adapter.save_pretrained(tmp_path / "adapter")
    out = prompts(capsys, "import", str(tmp_path / "adapter"), "--name", "trained", "--model", tiny_llama.path)
    assert out == "trained: 11 virtual tokens, kind embeddings\n"
    shown = json.loads(prompts(capsys, "show", "trained", "--json"))
    assert shown["source"] == "peft:PROMPT_TUNING"
    # What a server computes from the model in its own precision is the same.
    assert shown["model"]["fingerprint"] == tiny_spec.fingerprint


def test_a_running_server_sees_what_is_imported(
    tiny_server: Server,
    tiny_llama: Reference,
    tiny_spec: ModelSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = make_soft_prompt("embeddings", 13, tiny_spec, scale=0.5)
    path = save_prompt(prompt, tmp_path, "prompt")
    flags = ("--prompt-store", str(tiny_server.store))
    prompts(capsys, "import", str(path), "--name", "from-outside", *flags)
    ids = tiny_llama.tokenizer("hello")["input_ids"]
    expected = tiny_llama.tokenizer.decode(tiny_llama.generate(ids, 8, prompt), skip_special_tokens=True)
    assert tiny_server.complete("hello", 8, model="from-outside") == expected
    prompts(capsys, "remove", "from-outside", *flags)
    assert tiny_server.post("/v1/completions", {"prompt": "hello", "model": "from-outside"}).status_code == 404
    assert not list(tiny_server.store.glob(".leases-*/*")), "the leased file stays behind"


def test_what_goes_wrong(store: Path, tiny_spec: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_prompt(make_soft_prompt("kv", 9, tiny_spec), tmp_path, "prompt")
    prompts(capsys, "import", str(path), "--name", "manual")
    cases = [
        (("show", "nobody"), "no soft prompt named 'nobody'"),
        (("remove", "nobody"), "no soft prompt named 'nobody'"),
        (("export", "manual", str(path)), "exists already"),
        (("import", str(path), "--name", "manual"), "exists already"),
        (("import", str(path), "--name", "../x"), "1 to 128 of the characters"),
        (("import", str(tmp_path / "nothing"), "--name", "x"), "No such file"),
        (("import", str(Path(__file__)), "--name", "x"), "not a soft prompt file"),
        (("list", "--max-prompt-mib", "0"), "--max-prompt-mib"),
    ]
    for arguments, message in cases:
        status = main(["prompts", *arguments])
        check_refusal(status, capsys.readouterr().err, (message,))
