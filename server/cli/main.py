"""The `softbatch` command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from softbatch.server.version import VERSION

_DESCRIPTION = """
Language model serving with continuous batching and compressed prompts: compress a long context once into a soft
prompt, register it under a name, and every request that names it is answered as if the context stood in front.
"""
_EXAMPLES = """
examples:
  softbatch serve                                     the embedded model on http://127.0.0.1:8000
  softbatch serve --model ./my-model --max-batch-size 64
  softbatch compress manual.md --name manual          learn a soft prompt that stands for manual.md
  softbatch score --input "…" --candidate A --candidate B --soft-prompt manual
  softbatch prompts import ./my-peft-adapter --name manual
  softbatch prompts list
  softbatch bench --workload short --concurrency 32   put load on a running server
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command it names; returns the exit status."""
    # Read when torch is loaded, here and in child processes. OpenMP threads spin long while they wait for each other,
    # which is slow as soon as anything else needs a core; never spinning costs much on an idle machine. So: briefly.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # torch's larger allocations, the KV cache above all, in huge pages: attention reads it from end to end.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands with their flags."""
    # Here, behind the variables that torch reads when it is loaded.
    from softbatch.server.cli import bench, compress, evaluate, prompts, score, serve

    parser = argparse.ArgumentParser(
        prog="softbatch",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"softbatch {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    serve.add_parser(commands)
    compress.add_parser(commands)
    evaluate.add_parser(commands)
    score.add_parser(commands)
    prompts.add_parser(commands)
    bench.add_parser(commands)
    return parser
