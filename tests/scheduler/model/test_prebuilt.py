"""Kernels compiled ahead: which of them a machine gets, and why none."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from softbatch.scheduler.model.cpu import build, prebuilt
from softbatch.scheduler.model.cpu.prebuilt import FOLDER, VARIANTS, Found, Key, Variant, find, write_manifest

HERE = Key("2.13.0", True, "x86_64", "0" * 64)
# What /proc/cpuinfo says of processors, as far as it matters; each generation has what those before it had.
HASWELL = {
    "sse",
    "sse2",
    "pni",
    "ssse3",
    "fma",
    "cx16",
    "sse4_1",
    "sse4_2",
    "movbe",
    "popcnt",
    "xsave",
    "avx",
    "f16c",
    "lahf_lm",
    "abm",
    "bmi1",
    "avx2",
    "bmi2",
}
ALDER_LAKE = HASWELL | {"avx_vnni", "gfni", "vaes"}
SKYLAKE = HASWELL | {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
CASCADE_LAKE = SKYLAKE | {"avx512_vnni"}
COOPER_LAKE = CASCADE_LAKE | {"avx512_bf16"}  # without VBMI
ICE_LAKE = CASCADE_LAKE | {
    "avx512ifma",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "gfni",
    "vaes",
}
ZEN_4 = ICE_LAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {"avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "avx_vnni"}
# Macros whose instruction sets Linux calls otherwise.
OTHER_NAMES = {"SSE3": "pni", "LZCNT": "abm", "BMI": "bmi1", "LAHF_SAHF": "lahf_lm", "CRC32": "sse4_2"}
NAMED = re.compile(r"^__([A-Z][A-Z0-9_]+)__$")
NO_INSTRUCTIONS = {"BIGGEST_ALIGNMENT"}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A folder as in a wheel with every variant."""
    write_manifest(tmp_path, HERE)
    for variant in VARIANTS:
        (tmp_path / f"{variant.name}.so").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        (HASWELL, "avx2"),
        (ALDER_LAKE, "avx2"),
        (SKYLAKE, "avx2"),
        (CASCADE_LAKE, "avx512"),
        (COOPER_LAKE, "avx512"),
        (ICE_LAKE, "avx512"),
        (ZEN_4, "avx512_bf16"),
        (SAPPHIRE_RAPIDS, "amx"),
    ],
    ids=["Haswell", "Alder Lake", "Skylake", "Cascade Lake", "Cooper Lake", "Ice Lake", "Zen 4", "Sapphire Rapids"],
)
def test_the_best_that_a_processor_can_run(wheel: Path, processor: set[str], name: str) -> None:
    assert find(HERE, processor, wheel).library == wheel / f"{name}.so"


@pytest.mark.parametrize("missing", sorted(VARIANTS[-1].needs))
def test_nothing_for_a_processor_that_lacks_something(wheel: Path, missing: str) -> None:
    processor = SAPPHIRE_RAPIDS - {missing}
    assert find(HERE, processor, wheel) == Found(
        None, "the prebuilt kernels are not used: they need AVX2, which this processor lacks"
    )


def test_the_next_best_where_a_wheel_has_few(wheel: Path) -> None:
    (wheel / "amx.so").unlink()
    (wheel / "avx512_bf16.so").unlink()
    assert find(HERE, SAPPHIRE_RAPIDS, wheel) == Found(wheel / "avx512.so", "prebuilt for AVX-512 with VNNI")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch": "2.14.1"}, "they were compiled for torch 2.13.0, and torch is 2.14.1"),
        ({"machine": "aarch64"}, "they were compiled for x86_64, and this is aarch64"),
        ({"cxx11_abi": False}, "torch was compiled with another C++ ABI"),
        ({"sources": "1" * 64}, "they were compiled from other sources"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_that_was_compiled_for_something_else(wheel: Path, change: dict[str, str], reason: str) -> None:
    found = find(replace(HERE, **change), SAPPHIRE_RAPIDS, wheel)
    assert found == Found(None, f"the prebuilt kernels are not used: {reason}")


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"torch": "2.13.0"}', '{"other": 1}'])
def test_a_folder_without_a_whole_manifest_is_none(wheel: Path, content: str | None) -> None:
    """Silently: an installation from source has none."""
    (wheel / "manifest.json").unlink()
    if content is not None:
        (wheel / "manifest.json").write_text(content)
    assert find(HERE, SAPPHIRE_RAPIDS, wheel) == Found(None, "")


@pytest.mark.parametrize(
    ("version", "kept"),
    [
        ("2.13.0", "2.13.0"),
        ("2.13.0+cpu", "2.13.0"),
        ("2.13.0+cu130", "2.13.0"),
        ("2.13.0+rocm7.1", "2.13.0+rocm7.1"),
        ("2.14.0a0+git1234567", "2.14.0a0+git1234567"),
        ("2.14.0.dev20261101+cpu", "2.14.0.dev20261101"),
    ],
)
def test_builds_of_torch_that_may_differ_are_told_apart(version: str, kept: str) -> None:
    assert Key.of(version, True).torch == kept


def test_the_key_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Key.of("2.13.0", True)
    assert Key.of("2.13.0", True) == before
    changed = tmp_path / "csrc"
    shutil.copytree(prebuilt.CSRC, changed)
    with (changed / "formats.h").open("a") as header:
        header.write("\n")
    monkeypatch.setattr(prebuilt, "CSRC", changed)
    assert asdict(Key.of("2.13.0", True)) | {"sources": ""} == asdict(before) | {"sources": ""}
    assert Key.of("2.13.0", True) != before


def test_a_library_that_cannot_be_loaded_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "avx2.so"
    damaged.write_bytes(b"damaged")
    monkeypatch.setattr(build, "find_prebuilt", lambda: Found(damaged, "prebuilt for AVX2"))
    with caplog.at_level(logging.INFO):
        assert not build._load_prebuilt(build.logger)
    assert "the prebuilt kernels cannot be loaded" in caplog.text


def test_the_source_tree_has_none() -> None:
    """Whoever works on the kernels gets those compiled from what they see."""
    assert not list(FOLDER.glob("*.so"))


def macros(*flags: str) -> set[str]:
    command = ["c++", *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    return set(re.findall(r"^#define (\w+)", subprocess.check_output(command, text=True), re.MULTILINE))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(prebuilt.platform.machine() != "x86_64", reason="the instruction sets are x86-64's")
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_compiler_uses_nothing_that_a_variant_does_not_ask_for(variant: Variant) -> None:
    """Else a processor would meet an instruction that it does not know."""
    names = {
        name for macro in macros(*variant.flags) - macros("-march=x86-64") for name in NAMED.findall(macro)
    } - NO_INSTRUCTIONS
    used = {OTHER_NAMES.get(name, name).lower() for name in names}
    assert {"avx2", "fma"} <= used
    assert {name.replace("_", "") for name in used} <= {need.replace("_", "") for need in variant.needs}
