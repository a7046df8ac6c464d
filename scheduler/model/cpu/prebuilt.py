"""Kernels that a wheel brings: what they were compiled for, and which of them fit this machine.

Imports no torch, as setup.py compiles from the same table.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
FOLDER = Path(__file__).parent / "prebuilt"
MANIFEST = "manifest.json"
FLAGS = ("-O3", "-fopenmp")
MACHINE = "x86_64"  # the one that all variants are for, as platform.machine() calls it


@dataclass(frozen=True)
class Variant:
    """Kernels for processors that have all of `needs`, as /proc/cpuinfo calls it; `flags` are the compiler's."""

    name: str
    title: str
    needs: frozenset[str]
    flags: tuple[str, ...]


def _variant(name: str, title: str, before: Variant | None, needs: str, flags: str) -> Variant:
    """One that can do all that `before` can, and more."""
    all_needs = (before.needs if before else frozenset()) | set(needs.split())
    return Variant(name, title, all_needs, (*(before.flags if before else ()), *flags.split()))


# What x86-64-v3 and -v4 mean stands in the psABI; Linux calls LZCNT abm. A flag behind -march= adds to it.
_AVX2 = _variant(
    "avx2",
    "AVX2",
    None,
    "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "-march=x86-64-v3",
)
_AVX512 = _variant(
    "avx512",
    "AVX-512 with VNNI",
    _AVX2,
    "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni",
    "-march=x86-64-v4 -mavx512vnni",
)
_AVX512_BF16 = _variant(
    "avx512_bf16",
    "AVX-512 with BF16 and VNNI",
    _AVX512,
    "avx512_bf16 avx512ifma avx512vbmi avx512_vbmi2 avx512_bitalg avx512_vpopcntdq",
    "-mavx512bf16 -mavx512ifma -mavx512vbmi -mavx512vbmi2 -mavx512bitalg -mavx512vpopcntdq",
)
_AMX = _variant(
    "amx", "AMX", _AVX512_BF16, "amx_tile amx_bf16 amx_int8", "-mamx-tile -mamx-bf16 -mamx-int8 -mtune=sapphirerapids"
)
VARIANTS = (_AMX, _AVX512_BF16, _AVX512, _AVX2)  # the best first


@dataclass(frozen=True)
class Key:
    """What compiled kernels must have in common with whoever loads them."""

    torch: str
    cxx11_abi: bool
    machine: str
    sources: str

    @staticmethod
    def of(torch_version: str, cxx11_abi: bool) -> Key:
        """Of this machine and these sources. PyTorch's own builds of a version have one ABI, for CPUs and for CUDA."""
        digest = hashlib.sha256(content_of_sources()).hexdigest()
        return Key(re.sub(r"\+(cpu|cu\d+)$", "", torch_version), cxx11_abi, platform.machine(), digest)


@dataclass(frozen=True)
class Found:
    """The prebuilt library for this machine, or None; `told` says which and why, and is empty if a wheel has none."""

    library: Path | None
    told: str


def sources() -> list[Path]:
    return sorted(CSRC.rglob("*.cpp"))


def content_of_sources() -> bytes:
    """Headers too."""
    return b"".join(path.read_bytes() for path in sorted([*sources(), *CSRC.rglob("*.h")]))


def write_manifest(folder: Path, key: Key) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(key), indent=2) + "\n")


def find(key: Key, processor: Collection[str], folder: Path = FOLDER) -> Found:
    """The best kernels in `folder` that a processor with these instruction sets can run."""
    try:
        built_for = Key(**json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return Found(None, "")
    if (reason := _difference(built_for, key)) is not None:
        return Found(None, f"the prebuilt kernels are not used: {reason}")
    there = [variant for variant in VARIANTS if (folder / f"{variant.name}.so").is_file()]
    for variant in there:
        if variant.needs <= set(processor):
            return Found(folder / f"{variant.name}.so", f"prebuilt for {variant.title}")
    least = f"{there[-1].title}, which this processor lacks" if there else "no processor at all"
    return Found(None, f"the prebuilt kernels are not used: they need {least}")


def _difference(built_for: Key, here: Key) -> str | None:
    if built_for.torch != here.torch:
        return f"they were compiled for torch {built_for.torch}, and torch is {here.torch}"
    if built_for.machine != here.machine:
        return f"they were compiled for {built_for.machine}, and this is {here.machine}"
    if built_for.cxx11_abi != here.cxx11_abi:
        return "torch was compiled with another C++ ABI"
    if built_for.sources != here.sources:
        return "they were compiled from other sources"
    return None


def processor_flags() -> frozenset[str]:
    """The instruction sets of this machine, as Linux names them; empty where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())
