"""The `softbatch` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

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
  softbatch chat --soft-prompt manual                 ask a running server in the terminal
  softbatch bench --workload short --concurrency 32   put load on a running server
"""
_HELP = {
    "serve": "serve a model over HTTP",
    "ray-serve": "serve it by several replicas on a Ray cluster",
    "compress": "turn a context into a registered soft prompt",
    "evaluate": "measure a registered soft prompt on questions of your own",
    "score": "log-probabilities of given answers",
    "prompts": "list, show, import, export or remove registered soft prompts",
    "chat": "talk with a running server in the terminal",
    "top": "watch a running server: its batch, its queue, its pace",
    "doctor": "what this machine can do, and what would make it faster",
    "bench": "put load on a server and measure it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command it names; returns the exit status."""
    # Read when torch is loaded, here and in child processes. OpenMP threads spin long while they wait for each other,
    # which is slow as soon as anything else needs a core; never spinning costs much on an idle machine. So: briefly.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # torch's larger allocations, the KV cache above all, in huge pages: attention reads it from end to end.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    given = sys.argv[1:] if arguments is None else list(arguments)
    # The flags before a command take no value, so the first word is the command.
    named = next((word for word in given if not word.startswith("-")), "")
    options = build_parser([named] if named in _HELP else []).parse_args(given)
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        return 130


def build_parser(commands: Sequence[str] = tuple(_HELP)) -> argparse.ArgumentParser:
    """The parser with the arguments of these commands; of the others it knows no more than what the help says."""
    parser = argparse.ArgumentParser(
        prog="softbatch",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    added = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, text in _HELP.items():
        if name in commands:
            # Here, as it knows every setting, which takes a while to import.
            from softbatch.server.cli.arguments import ARGUMENTS

            ARGUMENTS[name](added.add_parser(name, help=text))
        else:
            added.add_parser(name, help=text)
    return parser


class _Version(argparse.Action):
    """`--version`, which looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from softbatch.server.version import VERSION

        print(f"softbatch {VERSION}")
        parser.exit()
