"""compress, evaluate, score and prompts show, as a user runs them one after another, and a run that is killed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softbatch.prompt_store.compression.data.examples import load_jsonl
from softbatch.prompt_store.compression.frozen.frozen_model import Kernels
from softbatch.prompt_store.compression.work_directory import identity_of
from softbatch.prompt_store.soft_prompt_file import load
from softbatch.prompt_store.stores.directory import PromptStore
from softbatch.prompt_store.stores.kept_text import KeptText
from softbatch.scheduler.model.attention import cpu
from softbatch.server.cli.main import main
from softbatch.server.compressions.local_engine import LocalEngine
from softbatch.server.compressions.prepare import ModelFiles
from softbatch.server.compressions.request import ModelChoice, make_settings, read_questions
from softbatch.server.compressions.session import CPU_KERNELS, CompressionSession
from tests.server.compressions.conftest import CONTEXT, VIRTUAL_TOKENS, model_flags
from tests.support.models import load_reference
from tests.support.servers import PROJECT, environment, wait_for

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
BASELINES = {"no_context", "truncated", "untrained", "wrong_prompt", "full_context"}
FLAGS = ["--name", "harbour", "--steps", "3", "--virtual-tokens", str(VIRTUAL_TOKENS), "--seed", "5"]
MAX_BYTES = 8 << 20


def compress(context: Path, path: str, store: Path, *flags: str) -> list[str]:
    return ["compress", str(context), *FLAGS, *model_flags(path, store), *flags]


@pytest.fixture(scope="module")
def harbour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context") / "harbour.md"
    path.write_text(CONTEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def own_questions(harbour: Path) -> Path:
    path = harbour.parent / "own.jsonl"
    asked = [
        {"input": "When does the office open?", "output": "At seven."},
        {"input": "Which pier is the longest one?"},
    ]
    path.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def store(tiny_path: str, harbour: Path, own_questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the soft prompt that an uninterrupted run made; its report lies beside the store."""
    path = tmp_path_factory.mktemp("cli") / "store"
    flags = ("--report", str(path.parent / "report"), "--questions", str(own_questions), "--keep-text", "--recall", "1")
    assert main(compress(harbour, tiny_path, path, *flags)) == 0
    return path


def test_compress_registers_what_it_measured(store: Path, own_questions: Path) -> None:
    report = json.loads((store.parent / "report" / "report.json").read_text())
    assert {*METRICS, "compression_ratio", "seconds"} <= set(report)
    assert set(report["baselines"]) == BASELINES
    assert all(set(scores) >= METRICS for scores in report["baselines"].values())
    assert report["baselines"]["full_context"]["kl"] == pytest.approx(0, abs=1e-6)
    page = (store.parent / "report" / "report.html").read_text()
    assert "<svg" in page
    assert "<script" not in page

    stored = PromptStore(store, MAX_BYTES).get("harbour")
    assert PromptStore(store, MAX_BYTES).kept_text(stored) == KeptText(text=CONTEXT, recall=1)
    manifest = stored.manifest
    assert (manifest.kind, manifest.objective, manifest.replaces) == ("kv", "kl", "system")
    assert manifest.num_virtual_tokens == VIRTUAL_TOKENS
    assert manifest.context is not None
    assert manifest.context.sha256 == hashlib.sha256(CONTEXT.encode()).hexdigest()
    assert manifest.context.num_tokens == report["context_tokens"]
    assert manifest.training["seed"] == 5
    assert manifest.training["steps"] == 3
    for name in (*METRICS, "compression_ratio"):
        assert manifest.fidelity[name] == report[name], name
    assert manifest.fidelity["baselines"] == report["baselines"]

    trained = load_jsonl(store.parent / "report" / "train.jsonl")
    assert trained[0].input == "When does the office open?"
    assert trained[0].output == "At seven."
    held_out = {example.input for example in load_jsonl(store.parent / "report" / "held_out.jsonl")}
    assert not held_out & {example.input for example in trained}
    assert not held_out & {example.input for example in load_jsonl(own_questions)}
    assert {path.name for path in (store / ".compressions" / "harbour").iterdir()} == {"lock", "report"}
    assert [prompt.name for prompt in PromptStore(store, MAX_BYTES).list()] == ["harbour"]
    assert PromptStore(store, MAX_BYTES).broken() == []


def test_prompts_show_has_the_fidelity(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "show", "harbour", "--json", "--prompt-store", str(store)]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert {*METRICS, "baselines", "off_topic"} <= set(shown["fidelity"])


def test_evaluate_on_questions_of_ones_own(
    store: Path, tiny_path: str, harbour: Path, own_questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "graded.jsonl"
    graded = '{"input": "How often do I ring the brass bell?", "accept": ["twice", "two times"]}\n'
    questions.write_text(f"{own_questions.read_text()}\n{graded}")
    flags = ["--context", str(harbour), "--questions", str(questions), "--report", str(tmp_path / "report")]
    assert main(["evaluate", "harbour", *flags, *model_flags(tiny_path, store)]) == 0
    captured = capfd.readouterr()
    assert "note:" not in captured.err
    assert "0 of 1" in captured.out
    assert "retrieval, 3 times" in captured.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {*METRICS, "compression_ratio"} <= set(report)
    assert set(report["baselines"]) == BASELINES
    assert report["evaluation"]["questions"] == report["evaluation"]["free_answers"] == 3
    assert all(row["first_token_seconds"] > 0 for row in report["right_answers"].values())
    assert report["right_answers"]["recall"]["prompt_tokens"] > report["right_answers"]["soft_prompt"]["prompt_tokens"]
    assert report["baselines"]["full_context"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["kl"] > 0.001
    assert report["answers"][0]["gold"] == "At seven."
    assert (tmp_path / "report" / "report.html").is_file()
    assert f"{report['kl']:.3f}" in captured.out


def test_evaluate_says_when_the_text_is_another(
    store: Path, own_questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.md"
    other.write_text(CONTEXT.replace("seven", "nine"), encoding="utf-8")
    flags = ["--context", str(other), "--questions", str(own_questions), "--prompt-store", str(store)]
    assert main(["evaluate", "harbour", *flags, "--model", "./nowhere"]) == 2
    assert "was made of another text" in capfd.readouterr().err


def test_stopped_and_killed_it_goes_on_to_the_same_soft_prompt(
    store: Path, tiny_path: str, harbour: Path, own_questions: Path, tmp_path: Path
) -> None:
    """Ctrl-C, then kill -9 of the resumed run, then to the end: bit for bit what the uninterrupted run made."""
    interrupted = tmp_path / "interrupted"
    arguments = compress(harbour, tiny_path, interrupted, "--questions", str(own_questions))
    work = interrupted / ".compressions" / "harbour" / "work"

    first = start(arguments)
    wait_for(lambda: (work / "held_out.jsonl").exists() or first.poll() is not None, "no gold answers")
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    answered = (work / "held_out.jsonl").read_bytes()

    second = start([*arguments, "--resume"])
    wait_for(lambda: (work / "baselines.json").exists() or second.poll() is not None, "no baselines")
    second.kill()
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert not (interrupted / "harbour.safetensors").exists()

    assert main([*arguments, "--resume"]) == 0
    report = interrupted / ".compressions" / "harbour" / "report"
    assert (report / "held_out.jsonl").read_bytes() == answered
    expected, found = (load(path / "harbour.safetensors", MAX_BYTES) for path in (store, interrupted))
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "softbatch", *arguments],
        cwd=PROJECT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_budget_and_a_preview_survive_being_killed(
    tiny_path: str, harbour: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--minutes: killed when its preview is there, resumed, and at its end within what was left."""
    flags = ["--name", "harbour", "--virtual-tokens", "8", "--minutes", "0.25", "--preview", "--keep-text"]
    arguments = ["compress", str(harbour), *flags, *model_flags(tiny_path, tmp_path / "store")]
    store = PromptStore(tmp_path / "store", MAX_BYTES)
    process = start(arguments)
    wait_for(lambda: store.list() or process.poll() is not None, "no preview")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    preview = store.get("harbour")
    assert preview.manifest.preview_of is not None
    assert preview.manifest.fidelity["verdict"].startswith("preview")
    assert store.kept_text(preview) == KeptText(text=CONTEXT, recall=2)
    for action in (["list"], ["show", "harbour"]):
        assert main(["prompts", *action, "--prompt-store", str(store.root)]) == 0
        assert "preview" in capfd.readouterr().out
    assert main(arguments) == 2
    assert "add --resume" in capfd.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert {path.name for path in (store.root / ".compressions" / "harbour").iterdir()} == {"lock", "report"}
    manifest = store.get("harbour").manifest
    assert manifest.preview_of is None
    assert store.kept_text(store.get("harbour")) == KeptText(text=CONTEXT, recall=2)
    assert manifest.training["minutes"] == 0.25
    assert manifest.training["steps"] > 0


def test_resume_refuses_another_run(
    tiny_path: str, harbour: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "store" / ".compressions" / "harbour"
    directory.mkdir(parents=True)
    (directory / "model").write_text("0" * 64)
    assert main(compress(harbour, tiny_path, tmp_path / "store", "--resume")) == 2
    assert "another model" in capfd.readouterr().err


def test_a_finished_run_is_registered_for_its_own_context_only(
    store: Path, tiny_path: str, harbour: Path, own_questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its server was away when it was done, say; until it is resumed the context may have changed."""
    directory = tmp_path / "store" / ".compressions" / "harbour"
    (directory / "report").mkdir(parents=True)
    (directory / "work").mkdir()
    shutil.copyfile(store / "harbour.safetensors", directory / "soft_prompt.safetensors")
    shutil.copyfile(store.parent / "report" / "report.json", directory / "report" / "report.json")
    wanted = make_settings(virtual_tokens=VIRTUAL_TOKENS, steps=3, seed=5)
    record = {**identity_of(wanted, CONTEXT, read_questions(own_questions)), "elapsed": 1.0}
    (directory / "work" / "job.json").write_text(json.dumps(record))
    other = tmp_path / "other.md"
    other.write_text(CONTEXT.replace("seven", "nine"), encoding="utf-8")
    flags = ("--resume", "--questions", str(own_questions))
    assert main(compress(other, tiny_path, tmp_path / "store", *flags)) == 2
    assert "another context" in capfd.readouterr().err
    assert not (tmp_path / "store" / "harbour.safetensors").exists()
    for _ in range(2):  # killed before it cleared up, it says the same again
        kept = tmp_path / "kept"
        shutil.copytree(directory, kept)
        assert main(compress(harbour, tiny_path, tmp_path / "store", *flags)) == 0
        assert (tmp_path / "store" / "harbour.safetensors").exists()
        shutil.rmtree(directory)
        kept.rename(directory)
    (directory / "previewed").write_text("0" * 64)
    (tmp_path / "store" / "harbour.safetensors").unlink()  # the preview, say, while the run was stopped
    assert main(compress(harbour, tiny_path, tmp_path / "store", *flags)) == 0
    assert (tmp_path / "store" / "harbour.safetensors").exists()


def test_the_preview_of_another_run_is_not_registered(
    store: Path, tiny_path: str, harbour: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "store" / ".compressions" / "harbour"
    (directory / "work").mkdir(parents=True)
    shutil.copyfile(store / "harbour.safetensors", directory / "preview.safetensors")
    wanted = make_settings(virtual_tokens=VIRTUAL_TOKENS, steps=3, seed=5)
    record = {**identity_of(wanted, CONTEXT.replace("seven", "nine"), ()), "elapsed": 1.0}
    (directory / "work" / "job.json").write_text(json.dumps(record))
    assert main(compress(harbour, tiny_path, tmp_path / "store", "--preview", "--resume")) == 2
    assert "another context" in capfd.readouterr().err
    assert not (tmp_path / "store" / "harbour.safetensors").exists()


@pytest.mark.parametrize("before", ["nothing", "context", "soft prompt"])
def test_score_equals_transformers(
    before: str, store: Path, tiny_path: str, harbour: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = {"nothing": [], "context": ["--context", str(harbour)], "soft prompt": ["--soft-prompt", "harbour"]}[before]
    candidates = ["At seven.", "Never on Sundays", "Ask"]
    asked = ["--input", "When?", *(part for text in candidates for part in ("--candidate", text)), "--json"]
    assert main(["score", *asked, *flags, *model_flags(tiny_path, store)]) == 0
    reply = json.loads(capfd.readouterr().out)

    reference = load_reference(tiny_path)
    prompt = load(store / "harbour.safetensors", MAX_BYTES) if before == "soft prompt" else None
    turns = [{"role": "user", "content": "When?"}]
    if before == "context":
        turns.insert(0, {"role": "system", "content": CONTEXT})
    text = reference.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if prompt is not None:
        text = text[text.index("<|im_start|>user") :]
    shared = reference.tokenizer.encode(text, add_special_tokens=False)
    totals = []
    for candidate, scored in zip(candidates, reply["candidates"], strict=True):
        ids = [*reference.tokenizer.encode(candidate, add_special_tokens=False), 2]
        expected = logprobs(reference, shared, ids, prompt)
        assert [token["logprob"] for token in scored["tokens"]] == pytest.approx(expected, abs=2e-4)
        assert scored["logprob"] == pytest.approx(sum(expected), abs=1e-3)
        totals.append(sum(expected))
    assert reply["best"] == max(range(3), key=totals.__getitem__)
    normaliser = sum(math.exp(total) for total in totals)
    shares = [scored["probability"] for scored in reply["candidates"]]
    assert shares == pytest.approx([math.exp(total) / normaliser for total in totals], abs=1e-3)


@torch.inference_mode()
def logprobs(reference, shared: list[int], ids: list[int], prompt) -> list[float]:  # type: ignore[no-untyped-def]
    from transformers import DynamicCache

    cache = DynamicCache(config=reference.model.config)
    if prompt is not None:
        for layer in range(prompt.keys.shape[0]):
            cache.update(prompt.keys[layer][None].transpose(1, 2), prompt.values[layer][None].transpose(1, 2), layer)
    logits = reference.model(torch.tensor([[*shared, *ids]]), past_key_values=cache).logits[0]
    table = torch.log_softmax(logits, -1)
    return [float(table[len(shared) - 1 + i, token]) for i, token in enumerate(ids)]


def test_models_are_opened_with_the_kernels_where_they_are(tiny_path: str) -> None:
    for dtype in ("float32", "bfloat16", "float16"):  # the last one's gradients go through torch
        files = ModelFiles.open(ModelChoice(tiny_path, dtype=dtype, device="cpu"))
        bench = CompressionSession.open(files, files.context(CONTEXT, None, 6), MAX_BYTES)
        bench.release_engine()
        kernels = bench.decoder.kernels
        assert kernels.attend_without_gradients is (cpu.behind_prefix if cpu.build() else Kernels().attend)
        assert (kernels == CPU_KERNELS) == (cpu.build() is not None and dtype != "float16")


def test_gold_answers_are_those_of_transformers(tiny_path: str) -> None:
    """More questions than slots, of many lengths, behind one context that is computed once."""
    reference = load_reference(tiny_path)
    encode = reference.tokenizer.encode
    shared = encode(CONTEXT * 7)
    prompts = [[*shared, *encode(f"Question {i}: " + "why is that so? " * (i % 7))] for i in range(70)]
    engine = LocalEngine(
        ModelFiles.open(ModelChoice(tiny_path, dtype="float32", device="cpu")), len(shared) + 100, 6, MAX_BYTES
    )
    try:
        answers = engine.generate(prompts, 6, frozenset({2}))
        assert engine.generate([], 6, frozenset({2})) == []
        for index in (0, 1, 5, 13, 69):
            assert answers[index] == reference.generate(prompts[index], 6), index
        with pytest.raises(ValueError, match="exceed"):
            engine.generate([[5] * 3000], 6, frozenset({2}))
    finally:
        engine.close()
