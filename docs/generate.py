"""Writes the pages of docs/reference that say what the code says: commands, routes, metrics and error codes."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from softbatch.prompt_store.compression.frozen.layer_kinds import windows_of
from softbatch.scheduler.model.cuda import fused
from softbatch.scheduler.model.family import Family
from softbatch.scheduler.model.llama.description import is_described, is_plain
from softbatch.server.app import Services, create_app
from softbatch.server.cli.main import build_parser
from softbatch.server.compressions.job_queue import CompressionJobs
from softbatch.server.http.errors import _DEFAULT_CODES
from softbatch.server.observability.metrics import Metrics
from softbatch.server.settings import Settings
from tests.support.families import SERVED, skeleton

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
PACKAGES = ("prompt_store", "scheduler", "server")
_NOTE = "<!-- Made by docs/generate.py (make docs-reference); change the code, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    return {
        "cli.md": cli(),
        "http-api.md": http_api(),
        "metrics.md": metrics(),
        "errors.md": errors(),
        "models.md": models(),
    }


def cli() -> str:
    """Every command with its arguments, as argparse knows them."""
    text = "# Commands\n\n" + _NOTE
    text += "Every flag of `softbatch serve` can also be set through the environment variable that stands behind it.\n"
    for parser in _commands(build_parser()):
        text += f"\n## {parser.prog}\n\n{_line(parser.description)}\n"
        rows = [
            (_names(action), _line((action.help or "") % {**vars(action), "prog": parser.prog}))
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
            and action.help is not argparse.SUPPRESS
        ]
        text += _table(("argument", "meaning"), rows)
    return text


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands below a parser, in the order in which they were added; one that only holds others is left out."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                if not any(isinstance(inner, argparse._SubParsersAction) for inner in command._actions):
                    yield command
                yield from _commands(command)


def _names(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else None
    if value is None and action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"`{value or action.dest}`"
    value = value or action.dest.upper()
    names = ", ".join(action.option_strings)
    return f"`{names}`" if action.nargs == 0 else f"`{names} {value}`"


def http_api() -> str:
    """Every route of the OpenAPI document, with what it takes and gives."""
    services = SimpleNamespace(settings=Settings.model_construct(), tracing=None)
    document = create_app(cast(Services, services)).openapi()
    schemas: Mapping[str, Any] = document["components"]["schemas"]
    text = "# HTTP API\n\n" + _NOTE
    text += (
        "A running server shows the same at `/docs`, and as an OpenAPI document at `/openapi.json`. Errors have one\n"
    )
    text += "shape on all routes: see [Errors](errors.md).\n"
    used: set[str] = set()
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            text += f"\n## {method.upper()} {path}\n\n{_line(route.get('summary'))}.\n".replace("?.", "?")
            if route.get("description"):
                text += f"\n{_line(route['description'])}\n"
            body = _content_schema(route.get("requestBody", {}))
            if body:
                name, schema = _resolved(body, schemas)
                used |= _references(schema)
                text += f"\nTakes {_link(name)}:\n" if name in used else "\nTakes:\n"
                text += _fields(schema)
            for status, reply in route["responses"].items():
                shape = _content_schema(reply)
                if status.startswith("2") and "$ref" in shape:
                    used |= _references(shape)
                    text += f"\nGives {status}: {_type(shape)}.\n"
    return text + _shapes(used, schemas)


def _shapes(used: set[str], schemas: Mapping[str, Any]) -> str:
    """The named shapes that the routes refer to, and those which these refer to."""
    pending = set(used)
    while pending:
        pending = {inner for name in pending for inner in _references(schemas[name])} - used
        used |= pending
    text = "\n## Shapes\n"
    for name in sorted(used):
        text += f"\n### {name}\n"
        if schemas[name].get("description"):
            text += f"\n{_line(schemas[name]['description'])}\n"
        text += _fields(schemas[name])
    return text


def _content_schema(part: Mapping[str, Any]) -> Mapping[str, Any]:
    for content in part.get("content", {}).values():
        schema = content.get("schema", {})
        return cast(Mapping[str, Any], schema.get("contentSchema", schema))
    return {}


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    return name, schemas.get(name, schema)


def _references(value: object) -> set[str]:
    if isinstance(value, Mapping):
        own = {str(value["$ref"]).rsplit("/", 1)[-1]} if "$ref" in value else set()
        return own.union(*(_references(inner) for inner in value.values()))
    if isinstance(value, list):
        return set[str]().union(*(_references(inner) for inner in value))
    return set()


def _fields(schema: Mapping[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        (
            f"`{name}`" + (" (required)" if name in required else ""),
            _type(field),
            f"`{field['default']!r}`" if field.get("default") is not None else "",
            _line(field.get("description")),
        )
        for name, field in schema.get("properties", {}).items()
    ]
    return _table(("field", "type", "default", "meaning"), rows) if rows else ""


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return _link(field["$ref"].rsplit("/", 1)[-1])
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(_type(option) for option in field[key]))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    return kind + _bounds(field)


def _bounds(field: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]}" for key, sign in signs.items() if key in field]
    return f" ({', '.join(bounds)})" if bounds else ""


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def metrics() -> str:
    """Every metric of the server's registry."""
    registry = Metrics().registry
    CompressionJobs(cast(Any, SimpleNamespace(root=ROOT)), cast(Any, None), registry, lambda: False)
    rows = []
    for collector in dict.fromkeys(registry._collector_to_names):
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in getattr(collector, "_labelnames", ()))
            rows.append((f"`{name}`", family.type, labels, _line(family.documentation)))
    text = "# Metrics\n\n" + _NOTE
    text += (
        "`GET /metrics` gives these in Prometheus' text format. [Operations](../guides/operations.md) says which to\n"
    )
    text += "alert on. A histogram has `_bucket`, `_sum` and `_count`.\n"
    return text + _table(("metric", "type", "labels", "meaning"), rows)


def errors() -> str:
    """Every error code that the code names."""
    text = "# Errors\n\n" + _NOTE
    text += (
        "Every answer other than 2xx has one shape, and a stream that fails ends with an event of the same shape:\n\n"
    )
    text += '```json\n{"error": {"message": "…", "type": "…", "param": "…", "code": "…"}}\n```\n\n'
    text += (
        "On `/generate`, `/generate_stream` and `/` it is the one of text-generation-inference, whose clients raise\n"
    )
    text += "their own exceptions for the types `validation`, `overloaded` (429, 503) and `generation` (5xx):\n\n"
    text += '```json\n{"error": "…", "error_type": "…", "param": "…", "code": "…"}\n```\n\n'
    text += "On `/v1/messages` and `/v1/messages/count_tokens` it is Anthropic's, with Anthropic's types:\n\n"
    text += '```json\n{"type": "error", "error": {"type": "…", "message": "…", "param": "…", "code": "…"}}\n```\n\n'
    text += "`message` is for people and may change. `param` names the field at fault, or is null. `code` is stable:\n"
    text += "decide on it. If an answer carries `Retry-After`, the same request may work later.\n"
    text += "\n## Types\n"
    types = [("401", "`authentication_error`"), ("429", "`requests`"), ("other 4xx", "`invalid_request_error`")]
    text += _table(("status", "`type`"), [*types, ("5xx", "`server_error`")])
    text += "\n## Codes of a status\n\nAn error without a code of its own has the one of its status.\n"
    text += _table(("status", "`code`"), [(str(status), f"`{code}`") for status, code in _DEFAULT_CODES.items()])
    text += "\n## All codes\n\nA field that the schema refuses has pydantic's name for the reason as its code"
    text += " (`missing`, `less_than_equal`, …), or one of these:\n\n"
    return text + "".join(f"- `{code}`\n" for code in sorted(error_codes()))


def models() -> str:
    """Every family that the tests serve, and where its models run, as the code decides it."""
    rows = [(name, *_where_it_runs(kind, fields)) for name, (kind, fields) in sorted(SERVED.items())]
    head = ("family", "`model_type`", "what differs from Llama", "on a CPU", "on a GPU", "compression")
    return f"# Models\n\n{_NOTE}{_ABOUT_MODELS}{_table(head, rows)}{_BELOW_MODELS}"


_ABOUT_MODELS = """\
Each line is tested on a tiny random model with windows shorter than its prompts
(`tests/scheduler/engine/test_families.py`): in float32, log-probabilities are within 1e-4 of transformers', and greedy
output is equal token for token, in chunks, in batches and after preemptions. Any other causal language model of
transformers that calls its attention through transformers' interface is served too; the check at the start
([Loading and checks](../internals/loading.md)) refuses what would come out wrong.
"""
_BELOW_MODELS = """
On a CPU, *one call* is the C++ decoder, with all of `--quantization` and `--kv-cache-dtype`; *layer by layer* is
transformers' own code around our attention kernels, several times slower. A GGUF file of a family in one call may be
served with its own blocks (`--quantization native`): tested on a tiny Llama of every kind of blocks, against
transformers on the file's exact values (`tests/scheduler/model/test_native_weights.py`). On a GPU, *fused* kernels are
for models without a window that some sequence reaches.

gpt-oss's experts are served from their MXFP4 blocks on a CPU: those of a directory, also with `--quantization
native`, and those of a GGUF file that has all of them in MXFP4. Tested on tiny models, against transformers with all of
them widened (`tests/scheduler/model/test_mxfp4.py`).

Compression trains with *kernels* on a CPU, or through *torch*, after a check like the one above; *no* means that it
refuses. [Compression](../internals/compression.md#windows) says what windows change.

Blocks of the KV cache behind a window are not freed: a block holds all layers' keys, and in most of these models some
layers see everything. A soft prompt is a prefix like any other: layers with a window see no more of it than of a text
in its place.
"""


def _where_it_runs(kind: str, fields: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    model = skeleton(kind, **fields)
    # The same without a window that some sequence reaches.
    rest = {name: value for name, value in fields.items() if name not in ("sliding_window", "use_sliding_window")}
    wide = skeleton(kind, **rest, **({"sliding_window": 256} if "sliding_window" in fields else {}))
    try:
        windows_of(model.config)
        has_sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
        compression = "no" if has_sinks else "kernels" if is_plain(model) else "torch"
    except ValueError:
        compression = "no"
    return (
        f"`{kind}`",
        ", ".join(_differences(model)),
        "one call" if is_described(model) else "layer by layer",
        "fused" if fused.supports(wide) else "layer by layer",
        compression,
    )


def _differences(model: Any) -> Iterator[str]:
    config, family = model.config, Family.of(model.config)
    names = {name.rsplit(".", 2)[-2 if name.endswith("weight") else -1] for name, _ in model.named_parameters()}
    positions = getattr(config, "rope_parameters", None) or {}
    for differs, what in (
        (any(family.windows), "sliding windows"),
        (family.softcap, "capped scores"),
        ("sinks" in names, "sinks"),
        (names & {"q_norm", "k_norm"}, "norms of queries and keys"),
        (names & {"post_feedforward_layernorm"}, "norms behind attention and MLP"),
        (0 in (getattr(config, "no_rope_layers", None) or ()), "layers without positions"),
        (positions.get("partial_rotary_factor", 1) != 1, "partial rotary"),
        ("llama_4_scaling_beta" in positions, "queries scaled by position"),
        (family.length_rule, "positions turned by the length of the sequence"),
        (len({id(each) for each in positions.values() if isinstance(each, Mapping)}) > 1, "several rotary bases"),
        (getattr(config, "num_local_experts", None), "experts"),
        (getattr(config, "residual_multiplier", 1) != 1, "multipliers"),
    ):
        if differs:
            yield what


def error_codes() -> set[str]:
    """The string constants that the code gives as `code` of an error, or as the kind of a refused field."""
    trees = [ast.parse(path.read_text()) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = set(_DEFAULT_CODES.values())
    positions: dict[str, int] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= _default_codes(node)
            names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            if "code" in names and node.name != "__init__":
                positions[node.name] = names.index("code")
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
        position = 0 if name == "PydanticCustomError" else positions.get(name)
        if position is not None:
            given += node.args[position : position + 1]
        found |= {code for value in given for code in _constants(value)}
    return found


def _default_codes(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    arguments = function.args
    plain = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    pairs = [
        *zip(plain, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return {code for argument, default in pairs if argument.arg == "code" for code in _constants(default)}


def _constants(value: ast.expr | None) -> set[str]:
    if isinstance(value, ast.IfExp):
        return _constants(value.body) | _constants(value.orelse)
    return {value.value} if isinstance(value, ast.Constant) and isinstance(value.value, str) else set()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _line(text: str | None) -> str:
    """One line, safe inside of a table and of Markdown's HTML."""
    return " ".join((text or "").split()).replace("<", "&lt;")


def main() -> int:
    """Write the pages."""
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
