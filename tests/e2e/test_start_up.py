"""Starting, and refusing to: one line that says what to change. And the commands that need no server."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from softbatch.scheduler.model.loader import load
from softbatch.scheduler.model.source import ModelError
from softbatch.scheduler.protocol import EngineConfig
from softbatch.server.cli.main import main
from tests.e2e.conftest import StartServer
from tests.support.models import Reference
from tests.support.servers import PROJECT, Server, check_refusal, environment, free_port, wait_for

WRONG_FLAGS = [
    (("--port", "many"), ("--port", "valid integer", "'many'")),
    (("--port", "0"), ("--port", "greater than or equal to 1")),
    (("--port", "70000"), ("--port", "65535")),
    (("--max-batch-size", "0"), ("--max-batch-size", "greater than or equal to 1")),
    (("--max-batch-size", "1e3"), ("--max-batch-size", "valid integer")),
    (("--max-batch-size", "9" * 400), ("--max-batch-size",)),
    (("--max-queue-size", "-1"), ("--max-queue-size", "greater than or equal to 0")),
    (("--max-batch-tokens", "16"), ("--max-batch-tokens 16 is less than --max-batch-size 32",)),
    (("--kv-cache-gib", "nan"), ("--kv-cache-gib", "finite")),
    (("--kv-cache-gib", "0"), ("--kv-cache-gib", "greater than 0")),
    (("--dtype", "float8"), ("--dtype", "'float32'", "'float8'")),
    (("--kv-cache-dtype", "fp8"), ("--kv-cache-dtype", "'int8'", "'k6v4'", "'fp8'")),
    (("--device", "tpu"), ("--device", "'cpu'")),
    (("--host", "0.0.0.0"), ("--host 0.0.0.0", "--api-key")),
    (("--api-key", ""), ("--api-key",)),
    (("--served-model-name", "a b"), ("--served-model-name",)),
    (("--otlp-endpoint", "localhost:4318"), ("--otlp-endpoint", "http://localhost:4318")),
    (("--otlp-endpoint", "http://"), ("--otlp-endpoint", "http://localhost:4318")),
    (("--otlp-endpoint", "http://a:b"), ("--otlp-endpoint", "http://localhost:4318")),
    (("--otlp-endpoint", "http://a:4318/v1/traces"), ("--otlp-endpoint", "base address")),
    (("--temperature", "1"), ("unrecognized arguments: --temperature",)),
    (("--model",), ("--model", "expected one argument")),
]


@pytest.mark.parametrize(("flags", "parts"), WRONG_FLAGS, ids=lambda value: " ".join(value)[:40])
@pytest.mark.usefixtures("no_settings")
def test_wrong_flags(flags: tuple[str, ...], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is started, so no process of its own is needed."""
    try:
        status = main(["serve", *flags])
    except SystemExit as exit:
        status = int(exit.code or 0)
    check_refusal(status, capsys.readouterr().err, parts)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("SOFTBATCH_MAX_BATCH_SIZE", "0", ("SOFTBATCH_MAX_BATCH_SIZE", "greater than or equal to 1")),
        ("SOFTBATCH_DTYPE", "int4", ("SOFTBATCH_DTYPE", "'float32'")),
        ("SOFTBATCH_HOST", "0.0.0.0", ("--host 0.0.0.0", "--api-key")),
    ],
)
def test_wrong_environment(
    no_settings: pytest.MonkeyPatch,
    name: str,
    value: str,
    parts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_settings.setenv(name, value)
    check_refusal(main(["serve"]), capsys.readouterr().err, parts)


def test_a_process_that_refuses(tmp_path: Path) -> None:
    """The installed command."""
    result = subprocess.run(
        [str(Path(sys.executable).with_name("softbatch")), "serve", "--prompt-store", str(tmp_path)],
        cwd=PROJECT,
        env=environment(SOFTBATCH_MAX_BATCH_SIZE="0"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    check_refusal(result.returncode, result.stderr, ("--max-batch-size", "SOFTBATCH_MAX_BATCH_SIZE"))
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken(
    tmp_path: Path, no_settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before the model is loaded."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        status = main(["serve", "--port", port, "--prompt-store", str(tmp_path)])
    check_refusal(status, capsys.readouterr().err, (f"127.0.0.1:{port}", "choose another --host or --port"))


@pytest.fixture(scope="session")
def chunked_model(tiny_llama: Reference, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokens behind the first 64 see none of these, which is not supported."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["chunked_attention"] * 2,
        attention_chunk_size=64,
        max_position_embeddings=128,
    )
    path = tmp_path_factory.mktemp("models") / "chunked"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama.path).save_pretrained(path)
    return str(path)


def test_a_model_that_is_not_there(tiny_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Known only once the engine looks for it; both processes then end in good order."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "softbatch",
            "serve",
            *tiny_flags,
            "--model",
            "/nowhere/model",
            "--port",
            str(free_port()),
        ],
        cwd=PROJECT,
        env=environment(SOFTBATCH_PROMPT_STORE=str(tmp_path / "store")),
        capture_output=True,
        text=True,
        timeout=240,
    )
    check_refusal(done.returncode, done.stderr, ("--model /nowhere/model", "neither"))
    assert "Fatal Python error" not in done.stderr


def test_a_model_that_is_not_supported(
    tiny_flags: tuple[str, ...],
    chunked_model: str,
    tmp_path: Path,
    no_settings: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Known only once the engine, in its process, looks at it; the front end that tells of it needs none of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        flags = ("--model", chunked_model, "--prompt-store", str(tmp_path / "store"), "--port", str(free_port()))
        status = main(["serve", *tiny_flags, *flags])
    finally:
        signal.signal(signal.SIGTERM, before)
    check_refusal(
        status,
        capsys.readouterr().err,
        ("attention_chunk_size", "--max-model-len 64 serves it"),
    )


def test_models_that_cannot_be_loaded(tiny_llama: Reference, tmp_path: Path) -> None:
    """What the engine process would say as its last word."""
    no_config = tmp_path / "no-config"
    no_config.mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama.path, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    cases = [
        (EngineConfig(model=str(no_config)), "no config.json"),
        (EngineConfig(model=str(broken)), "broken: transformers cannot load it"),
        (EngineConfig(model=tiny_llama.path, kv_cache_gib=1e-6), "--kv-cache-gib 1e-06 holds .* give at least"),
        (EngineConfig(model=tiny_llama.path, max_model_len=100_000), "--max-model-len 100000 is more than .* 16384"),
        (EngineConfig(model="smollm3"), "neither the alias smollm2-135m"),
    ]
    for config, message in cases:
        with pytest.raises(ModelError, match=message) as refused:
            load(config, lambda *_: None)
        assert "\n" not in str(refused.value)


def test_the_log_tells_each_phase_with_its_seconds(tiny_server: Server) -> None:
    log = tiny_server.log.read_text()
    for phase in ("process", "model files", "weights", "attention kernel", "KV cache", "self-check", "tokenizer"):
        assert re.search(rf"INFO {phase} +\d+\.\d\d s", log), phase
    assert re.search(r"INFO ready after \d+\.\d\d s", log)
    assert f"serving tiny-llama on {tiny_server.url}" in log
    assert "blocks of 16 tokens" in log


def test_the_log_has_a_line_for_each_request(tiny_server: Server) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "n": 2, "temperature": 0, "ignore_eos": True}
    reply = tiny_server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "the-one"})
    assert reply.headers["x-request-id"] == "the-one"
    text = wait_for(lambda: "id=the-one" in (log := tiny_server.log.read_text()) and log, "the request is not logged")
    [line] = [line for line in text.splitlines() if "id=the-one" in line]
    assert "POST /v1/completions" in line
    assert "status=200" in line
    assert line.endswith("prompt_tokens=3 completion_tokens=8")


class TestHelp:
    def test_of_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit:
            main(["--help"])
        assert exit.value.code == 0
        text = capsys.readouterr().out
        for word in ("serve", "prompts", "examples:", "softbatch prompts import"):
            assert word in text

    def test_of_every_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit:
            main(["serve", "--help"])
        assert exit.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for flag in ("model", "host", "port", "dtype", "device", "max-batch-size", "max-batch-tokens", "max-model-len"):
            assert f"--{flag} " in text
            assert f"[SOFTBATCH_{flag.upper().replace('-', '_')}]" in text
        assert "(default: 8000)" in text

    @pytest.mark.parametrize("arguments", [[], ["prompts"], ["dance"], ["prompts", "import", "x"]])
    def test_of_half_a_command(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        assert "usage: softbatch" in capsys.readouterr().err


# Found by every Python that starts: the server's front end, not its engine, takes long to import transformers.
SLOW_IMPORTS = """
import sys, threading, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.utils" and threading.current_thread() is not threading.main_thread():
            time.sleep(8)

sys.meta_path.insert(0, Slow())
"""


def test_the_tokenizer_is_not_read_while_another_thread_imports_transformers(
    start_server: StartServer, tiny_flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Whoever imports a package that another thread still imports gets what it was before it had its lazy names."""
    start_server(*tiny_flags)  # whose engine then starts without transformers
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORTS)
    server = start_server(*tiny_flags, env={"PYTHONPATH": str(tmp_path)})
    body = {"model": "tiny-llama", "prompt": "winter", "max_tokens": 3}
    assert server.http.post("/v1/completions", json=body).status_code == 200
