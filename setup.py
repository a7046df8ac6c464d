"""Puts kernels compiled ahead into the wheel: those that SOFTBATCH_KERNELS names, as `make wheel` sets it.

Without it, nothing is compiled, and building needs setuptools alone. Nor is anything on a machine that no variant is
for. The table of variants stands in scheduler/model/cpu/prebuilt.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup

ROOT = Path(__file__).absolute().parent
PACKAGE = "softbatch.scheduler.model.cpu"


def with_kernels(names: list[str]) -> dict[str, Any]:
    """What setup needs for a wheel with these variants, or with all; nothing on a machine that no variant is for."""
    sys.path.insert(0, str(ROOT))
    from softbatch.scheduler.model.cpu import prebuilt

    variants = {variant.name: variant for variant in prebuilt.VARIANTS}
    if unknown := set(names) - {"all", *variants}:
        sys.exit(f"SOFTBATCH_KERNELS: there is no {', '.join(sorted(unknown))}; there are all, {', '.join(variants)}")
    chosen = list(variants) if "all" in names else names
    if (machine := platform.machine()) != prebuilt.MACHINE:
        print(f"no kernels are compiled ahead: they are for {prebuilt.MACHINE}, and this is {machine}", flush=True)
        return {}

    import torch
    from packaging.requirements import Requirement
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py

    from softbatch.scheduler.model.cpu.compiler import compile_library

    class WithKernels(build_py):
        """Compiles with build.py's flags, and for any processor of a kind."""

        def run(self) -> None:
            super().run()
            if self.editable_mode:
                return
            folder = Path(self.build_lib, *PACKAGE.split("."), "prebuilt")
            # The manifest speaks for all that lies here: nothing may be left of an earlier build.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name in chosen:
                print(f"compiling kernels for {variants[name].title}", flush=True)
                with tempfile.TemporaryDirectory() as directory:
                    library = compile_library(Path(directory), f"{name}.so", variants[name].flags, ["-s"])
                    shutil.move(library, folder / library.name)
            prebuilt.write_manifest(folder, prebuilt.Key.of(torch.__version__, torch.compiled_with_cxx11_abi()))

    class Pinned(Distribution):
        """Requires the torch that the kernels were compiled for, as wheels with operators of torch do."""

        def parse_config_files(self, *arguments: Any, **options: Any) -> None:
            super().parse_config_files(*arguments, **options)
            others = [text for text in self.install_requires if Requirement(text).name != "torch"]
            self.install_requires = [*others, f"torch=={torch.__version__.partition('+')[0]}"]
            self._finalize_requires()

        def has_ext_modules(self) -> bool:
            return True

    class AnyPython(bdist_wheel):
        """For one platform and any Python 3, as no kernel calls it."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"cmdclass": {"build_py": WithKernels, "bdist_wheel": AnyPython}, "distclass": Pinned}


names = os.environ.get("SOFTBATCH_KERNELS", "").split()
setup(**(with_kernels(names) if names else {}))
