"""Feeds the parsers with bytes led by coverage, and the API with requests made from its own document: `make fuzz`.

`--seconds` are for all parsers together, `--examples` for each operation. What is found ends the run with status 1;
inputs that broke a parser are kept in --found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import AutoTokenizer

from softbatch.prompt_store.soft_prompt_file import save as save_soft_prompt
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from tests.support.models import keep_first_tokens, save_tiny, tiny_config
from tests.support.servers import running_server
from tests.support.soft_prompt_samples import SPEC, soft_prompt

PARSERS = ("soft_prompt", "peft", "archive", "body", "context", "grammar")
MEMORY_MIB = 3072  # of a parser's process, torch included
VOCABULARY = 4096
# Left out: 504 for a request that gives itself a millisecond is right, null is taken wherever a field may be left out,
# what a field's neighbours rule out stands in no schema, `/` is a page for people as well as a route, and whatever is
# allowed at `/v1/queue/{id}` is at `/v1/queue/events` too.
LEFT_OUT = (
    "not_a_server_error,negative_data_rejection,positive_data_acceptance,unsupported_method,allow_header_conformance"
)
NO_FAULT = (504,)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--only", choices=["parsers", "api"])
    parser.add_argument("--paths", default=".", help="of the API: only those that this regular expression finds")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args(arguments)
    options.found.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "api":
            each = max(1, options.seconds // len(PARSERS))
            failed += [name for name in PARSERS if not parser_holds(name, each, Path(folder), options.found.resolve())]
        if options.only != "parsers" and not api_holds(options, Path(folder)):
            failed.append("api")
    print("found: " + (", ".join(failed) or "nothing"))
    return 1 if failed else 0


def parser_holds(name: str, seconds: int, folder: Path, found: Path) -> bool:
    seeds = folder / name
    seeds.mkdir()
    for number, content in enumerate(seeds_of(name, folder)):
        (seeds / str(number)).write_bytes(content)
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={found}/{name}-"]
    command = [sys.executable, "-m", "tests.fuzz.parsers", name, str(seeds), "-max_len=16384", *limits]
    done = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(folder)}, stderr=subprocess.PIPE, text=True, check=False
    )
    lines = done.stderr.strip().splitlines()
    print(f"{name:12} {lines[-1] if lines else ''}", flush=True)
    if done.returncode:
        print("\n".join(lines[-40:]))
    return done.returncode == 0


def seeds_of(name: str, folder: Path) -> list[bytes]:
    """What the parser takes, so that few steps lead to what it almost takes."""
    file = folder / "seed"
    config = json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}).encode()
    weights = save({"prompt_embeddings": torch.ones(3, SPEC.hidden_size)})
    if name == "soft_prompt":
        found = []
        for kind in ("embeddings", "kv"):
            save_soft_prompt(soft_prompt(kind, 2), file)
            found.append(file.read_bytes())
        return found
    if name == "peft":
        return [config + b"\n" + weights]
    if name == "archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/adapter_config.json", config)
            archive.writestr("a/adapter_model.safetensors", weights)
        return [file.read_bytes()]
    if name == "body":
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        chat = {"model": "m", "messages": [{"role": "user", "content": "a"}], "stop": ["b"], "response_format": schema}
        text = {"prompt": [1, 2], "logprobs": 3, "logit_bias": {}, "stream": True, "temperature": 0.5}
        other = {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "a"}}}
        return [json.dumps(body).encode() for body in (chat, text, other, {"input": "a", "candidates": ["b"]})]
    if name == "context":
        return ["One. Two?\r\n# Three\n日本".encode(), "a".encode("utf-16"), b"%PDF", b"PK\3\4"]
    return [
        b'\0{"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [1, "b"]}}}, "required": ["a"]}',
        rb"\1(a|b)*[0-9]{2,5}\d+",
        b'\2start: "a" b*\nb: /[0-9]+/\n',
    ]


def api_holds(options: argparse.Namespace, folder: Path) -> bool:
    """schemathesis against a server with a tiny model: every status that comes is documented, none is a 5xx."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    schemathesis = shutil.which("schemathesis", path=places) or "schemathesis"
    path = folder / "tiny"
    (folder / "server").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED_ALIAS).path)
    save_tiny(tiny_config("llama", vocab_size=VOCABULARY, max_position_embeddings=512), tokenizer, path)
    keep_first_tokens(path, VOCABULARY)
    with running_server(folder / "server", "--model", str(path), "--kv-cache-gib", "0.05") as server:
        report = options.found.resolve() / "api.ndjson"
        command = [
            *(schemathesis, "run", f"{server.url}/openapi.json"),
            *("--checks", "all", "--exclude-checks", LEFT_OUT, "--max-examples", str(options.examples)),
            *("--include-path-regex", options.paths, "--exclude-path", "/v1/queue/events"),  # this one never ends
            *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--suppress-health-check", "all"),
            *("--request-timeout", "120", "--no-color", "--report-ndjson-path", str(report)),
        ]
        done = subprocess.run(command, cwd=folder, check=False)
        assert server.http.get("/health").status_code == 200
        log = server.log.read_text(errors="replace")
    faults = [line for line in log.splitlines() if " status=5" in line and f"status={NO_FAULT[0]}" not in line]
    print("\n".join(faults[:20]))
    return done.returncode == 0 and not faults


if __name__ == "__main__":
    sys.exit(main())
