"""Imports that are never looked through for garbage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import gc
from softbatch.scheduler.lasting_imports import importing_for_good

with importing_for_good("gc"):
    assert gc.isenabled(), "it is there"
assert gc.get_freeze_count() == 0
try:
    with importing_for_good("fractions"):
        assert not gc.isenabled()
        import fractions, nowhere
except ImportError:
    pass
assert gc.isenabled()
assert gc.get_freeze_count() > 0
"""


def test_garbage_is_looked_for_again_behind_the_first_import() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
