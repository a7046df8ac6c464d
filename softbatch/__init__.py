"""The names that people import; the packages behind them stand beside this folder, which links to them.

Nothing is imported before it is asked for, so that `import softbatch` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softbatch.prompt_store.stores.directory import PromptStore as PromptStore
    from softbatch.server.compressions.offline import compress as compress

_EXPORTS = {
    "PromptStore": "softbatch.prompt_store.stores.directory",
    "compress": "softbatch.server.compressions.offline",
}
__all__ = ["PromptStore", "__version__", "compress"]


def __getattr__(name: str) -> Any:
    """Import an exported name at its first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("softbatch")
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'softbatch' has no attribute {name!r}")
