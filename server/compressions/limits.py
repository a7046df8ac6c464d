"""The sizes that the command line names as well."""

from __future__ import annotations

MIB = 1 << 20
MAX_CONTEXT_BYTES = 8 * MIB
