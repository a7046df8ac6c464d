"""`make wheel-check`: the wheel in an empty environment, with an empty home and no compiler, serves with its kernels.

    python tests/packaging/check_wheel.py dist/softbatch-….whl

pip is asked for the wheel alone; what it requires comes from the index that pip is set to.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
import zipfile
from pathlib import Path

READY_SECONDS = 240.0


def main() -> int:
    wheel = Path(sys.argv[1]).resolve()
    kernels = [name for name in zipfile.ZipFile(wheel).namelist() if re.search(r"prebuilt/\w+\.so$", name)]
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, kernels: {', '.join(map(os.path.basename, kernels))}")
    with tempfile.TemporaryDirectory(prefix="softbatch-wheel-") as directory:
        home, environment = Path(directory, "home"), Path(directory, "venv")
        home.mkdir()
        started = time.monotonic()
        venv.create(environment, with_pip=True)
        # With PYTHONPATH, pip would find the checkout and install nothing.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([environment / "bin" / "pip", "install", "--quiet", wheel], check=True, env=own)
        print(f"installed in {time.monotonic() - started:.0f} s")
        clean = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "OMP_"))}
        clean |= {"HOME": str(home), "PATH": str(environment / "bin"), "LANG": "C.UTF-8"}
        doctor = [environment / "bin" / "softbatch", "doctor", "--json"]
        found = subprocess.run(doctor, env=clean, cwd=home, stdout=subprocess.PIPE, text=True, check=False).stdout
        (told,) = (finding["found"] for finding in json.loads(found) if finding["about"] == "kernels")
        print(f"doctor: {told}")
        log = serve(environment / "bin" / "softbatch", clean, home)
    chosen = re.search(r"CPU kernels: (prebuilt for .*)", log)
    if chosen is None or "packed for the decoder in C++" not in log or not told.startswith(chosen[1]):
        print(log, "the wheel's own kernels are not in use", sep="\n", file=sys.stderr)
        return 1
    print(f"serve: {chosen[1]}")
    return 0


def serve(command: Path, environment: dict[str, str], home: Path) -> str:
    """Starts a server, asks it, ends it. Its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home / "log"
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen([command, "serve", "--port", str(port)], env=environment, cwd=home, stderr=output)
    try:
        print(f"first answer {ask(port, process)!r} after {time.monotonic() - started:.0f} s")
    finally:
        process.terminate()
        process.wait(timeout=60)
    return log.read_text()


def ask(port: int, process: subprocess.Popen[bytes]) -> str:
    question = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(question).encode())
    request.add_header("Content-Type", "application/json")
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text: str = json.load(answer)["choices"][0]["text"]
                return text
        except urllib.error.URLError:
            time.sleep(0.1)
    return "none"


if __name__ == "__main__":
    sys.exit(main())
