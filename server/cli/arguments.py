"""The arguments of every command. Nothing here imports what a command runs with: help and refusals come at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from softbatch.prompt_store.stores.kept_text import DEFAULT_RECALL, MAX_RECALL
from softbatch.server.bench.workload import WORKLOADS
from softbatch.server.cli.model_flags import add_model_flags, add_server_flags
from softbatch.server.cli.settings_flags import add_flags
from softbatch.server.cluster.cluster_settings import ClusterSettings
from softbatch.server.compressions.limits import MAX_CONTEXT_BYTES, MIB
from softbatch.server.schemas.score import MAX_CANDIDATES
from softbatch.server.settings import Settings

_COMPRESS = """
Learn a soft prompt that stands for CONTEXT, measure how faithful it is, and register it under NAME. Everything
runs on this machine and needs no server. Ctrl-C keeps what has been done; --resume goes on with it.
"""
_RECALL = (
    f"passages of the kept text that a request gets which does not say, 0 to {MAX_RECALL} (default: {DEFAULT_RECALL})"
)
_WORKLOADS = "; ".join(
    f"{w.name}: {w.input_tokens} tokens in, {w.output_tokens} out"
    + (f", behind one of {w.contexts} contexts of {w.context_tokens} tokens" if w.contexts else "")
    for w in WORKLOADS.values()
)


def _runs(command: str) -> Callable[[argparse.Namespace], int]:
    """What runs a command; its module is imported only then."""

    def run(options: argparse.Namespace) -> int:
        status: int = import_module(f"softbatch.server.cli.{command}").run(options)
        return status

    return run


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model over HTTP. Every flag can also be set through the environment."
    add_flags(parser)
    parser.set_defaults(run=_runs("serve"))


def _ray_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve by several replicas behind Ray Serve's proxy, on this machine or on a Ray cluster. Takes the flags of "
        "`softbatch serve`, for each replica, and these."
    )
    group = parser.add_argument_group("replicas")
    for name, field in ClusterSettings.model_fields.items():
        default = f" (default: {field.default})" if field.default is not None else ""
        metavar = "{affinity,default}" if name == "router" else "N"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=f"{field.description}{default}",
        )
    group.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of a running Ray cluster, such as auto; default: start one on this machine",
    )
    add_flags(parser)
    parser.set_defaults(run=_runs("ray_serve"))


def _compress(parser: argparse.ArgumentParser) -> None:
    parser.description = _COMPRESS
    parser.add_argument(
        "context",
        type=Path,
        metavar="CONTEXT",
        help=f"a text file (txt, md, …), up to {MAX_CONTEXT_BYTES // MIB} MiB",
    )
    parser.add_argument("--name", required=True, help="what requests will call the soft prompt")
    _add_training_settings(parser)
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="where report.html goes (default: in the prompt store)"
    )
    parser.add_argument(
        "--keep-text",
        action="store_true",
        help="keep the context in the prompt store, so that requests can recall passages",
    )
    parser.add_argument("--recall", type=int, metavar="K", help=_RECALL)
    parser.add_argument(
        "--preview",
        action="store_true",
        help="register the soft prompt before it is trained; the trained one takes its place",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    add_server_flags(parser, "register at this server instead of in the prompt store")
    add_model_flags(parser)
    parser.set_defaults(run=_runs("compress"))


def _add_training_settings(parser: argparse.ArgumentParser) -> None:
    """How the soft prompt is learnt."""
    parser.add_argument(
        "--objective",
        default="kl",
        metavar="{kl,nll,mixed}",
        help="kl keeps the model's uncertainty, nll reproduces its answers, mixed weighs both (default: kl)",
    )
    parser.add_argument("--alpha", type=float, metavar="A", help="weight of nll in mixed, 0 to 1 (default: 0.5)")
    parser.add_argument(
        "--kind",
        default="kv",
        metavar="{kv,embeddings}",
        help="keys and values of every layer, or input embeddings: far smaller, less faithful (default: kv)",
    )
    parser.add_argument("--virtual-tokens", type=int, metavar="N", help="length of the soft prompt (default: 64)")
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="Q.jsonl",
        help='questions of your own, a line each: {"input": "…"} to train on, with "output" if you have the answer; '
        'one with "accept": ["…"], texts of which a right answer contains one, is for measuring alone',
    )
    parser.add_argument(
        "--model-questions",
        type=int,
        metavar="N",
        help="questions the model itself asks, beside those from templates; small models ask poor ones (default: 0)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="how much of an answer is trained on, your own included (default: 48)",
    )
    parser.add_argument("--instruction", metavar="TEXT", help="put before the context and compressed with it")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, metavar="M", help="budget for everything (default: 10)")
    length.add_argument("--steps", type=int, metavar="N", help="training steps, however long they take")
    parser.add_argument(
        "--seed",
        dest="training_seed",
        type=int,
        metavar="S",
        help="the same seed and --steps give the same soft prompt",
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare the soft prompt NAME with the full context on questions it was not trained on."
    parser.add_argument("name")
    parser.add_argument("--context", type=Path, required=True, metavar="FILE", help="the text it was made of")
    parser.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="Q.jsonl",
        help='a line each: {"input": "…", "output"?: "…", "accept"?: ["…"]}; an answer that contains one of the '
        "accepted texts is right",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.json and report.html there")
    add_model_flags(parser)
    parser.set_defaults(run=_runs("evaluate"))


def _score(parser: argparse.ArgumentParser) -> None:
    parser.description = "log Pr(candidate | soft prompt or context or nothing, input) of each candidate, and the best."
    parser.add_argument("--input", required=True, metavar="TEXT", help="the user's turn")
    parser.add_argument(
        "--candidate", action="append", required=True, metavar="TEXT", help=f"an answer; up to {MAX_CANDIDATES} times"
    )
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--soft-prompt", metavar="NAME", help="what stands before the input")
    before.add_argument("--context", type=Path, metavar="FILE", help="or the text of a file, in the system turn")
    parser.add_argument("--json", action="store_true", help="print JSON, with the log-probability of every token")
    add_server_flags(parser, "ask this server instead of loading the model")
    add_model_flags(parser)
    parser.set_defaults(run=_runs("score"))


def _prompts(parser: argparse.ArgumentParser) -> None:
    parser.description = "Work on a prompt store directly; a running server with the same store sees every change."
    parser.set_defaults(run=_runs("prompts"))
    store = argparse.ArgumentParser(add_help=False)
    for name in ("prompt_store", "max_prompt_mib"):
        field = Settings.model_fields[name]
        store.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar="PLACE" if name == "prompt_store" else "N",
            help=f"{field.description} (default: {field.default}) [SOFTBATCH_{name.upper()}]",
        )
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    actions.add_parser("list", parents=[store], help="one line for each soft prompt")

    show = actions.add_parser("show", parents=[store], help="what one stands for, and how faithful it is")
    show.add_argument("name")
    show.add_argument("--json", action="store_true", help="everything that its file says, as JSON")

    importing = actions.add_parser(
        "import",
        parents=[store],
        help="register a soft prompt file or a PEFT adapter",
        description="FILE is a softbatch .safetensors file, a PEFT adapter folder, or a zip of one.",
    )
    importing.add_argument("file", type=Path)
    importing.add_argument("--name", required=True, help="what requests call it")
    importing.add_argument(
        "--keep-text",
        type=Path,
        metavar="FILE",
        help="the text that it was made of, kept for requests to recall passages",
    )
    importing.add_argument("--recall", type=int, metavar="K", help=_RECALL)
    importing.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="the model a PEFT adapter was trained on; it is loaded to check that the adapter fits "
        f"(default: {Settings.model_fields['model'].default}) [SOFTBATCH_MODEL]",
    )

    export = actions.add_parser("export", parents=[store], help="copy a soft prompt to a file")
    export.add_argument("name")
    export.add_argument("file", type=Path)

    remove = actions.add_parser("remove", parents=[store], help="unregister a soft prompt and delete its file")
    remove.add_argument("name")


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A closed loop of clients, or Poisson arrivals, against POST /v1/completions of any OpenAI-compatible server; "
        "prompts are random token ids, outputs have a fixed length. The server's processor time and memory are "
        "measured too when it runs on this machine."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token [SOFTBATCH_API_KEY]")
    work = parser.add_argument_group("what is asked")
    work.add_argument("--workload", choices=sorted(WORKLOADS), default="short", help=_WORKLOADS)
    work.add_argument("--input-tokens", type=_count, metavar="N", help="instead of the workload's")
    work.add_argument("--output-tokens", type=_count, metavar="N", help="instead of the workload's")
    work.add_argument("--contexts", type=_count, metavar="N", help="instead of the workload's")
    work.add_argument(
        "--soft-prompt",
        metavar="NAME",
        help="send the soft prompt of this name instead of the context; {index} is the context's number",
    )
    work.add_argument("--vocab-size", type=_vocabulary, default=32_000, metavar="N", help="tokens to draw from")
    work.add_argument("--seed", type=int, default=0, help="another seed, other prompts (default: %(default)s)")
    load = parser.add_argument_group("how much")
    load.add_argument("--concurrency", type=_count, default=8, metavar="N", help="clients of the closed loop")
    load.add_argument("--rate", type=_positive, metavar="R", help="Poisson arrivals, R a second, instead of clients")
    load.add_argument("--requests", type=_count, metavar="N", help="send so many (default: 8 for each client)")
    load.add_argument("--duration", type=_positive, metavar="SECONDS", help="measure a window of a steady load")
    goal = parser.add_argument_group("objective: which requests count as good")
    goal.add_argument("--slo-first-token", type=_positive, default=2.0, metavar="SECONDS", help="(default: 2)")
    goal.add_argument("--slo-per-token", type=_positive, default=0.2, metavar="SECONDS", help="(default: 0.2)")
    parser.add_argument("--pid", type=_count, help="the server's process; default: who listens on the port")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.set_defaults(run=_runs("bench"))


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.description = "Talk with a running server. Lines that begin with / are commands: /help lists them."
    _add_address(parser)
    parser.add_argument("--soft-prompt", metavar="NAME", help="answer through this soft prompt")
    parser.add_argument("--system", metavar="TEXT", help="an instruction before everything")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="the most tokens of an answer")
    parser.set_defaults(run=_runs("chat"))


def _top(parser: argparse.ArgumentParser) -> None:
    parser.description = "The running batch, the waiting queue and the pace of a running server, until Ctrl-C."
    _add_address(parser)
    parser.add_argument("--interval", type=_positive, default=1.0, metavar="SECONDS", help="(default: 1)")
    parser.add_argument("--once", action="store_true", help="one look, and end")
    parser.set_defaults(run=_runs("top"))


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at processor, memory, compiler, GPU and directories: what will run, how fast it can be, and what would "
        "make it faster. The exit status is 1 if something keeps softbatch from serving."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_flags(parser)
    parser.set_defaults(run=_runs("doctor"))


def _add_address(parser: argparse.ArgumentParser) -> None:
    add_server_flags(parser, "the server (default: %(default)s)")
    parser.set_defaults(server="http://127.0.0.1:8000")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _vocabulary(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError("a vocabulary has at least 2 tokens")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


ARGUMENTS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "serve": _serve,
    "ray-serve": _ray_serve,
    "compress": _compress,
    "evaluate": _evaluate,
    "score": _score,
    "prompts": _prompts,
    "chat": _chat,
    "top": _top,
    "doctor": _doctor,
    "bench": _bench,
}
