"""report.html: the report as one file that opens from disk. Inline SVG and CSS, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

_LABELS = {
    "soft_prompt": "soft prompt",
    "no_context": "no context",
    "truncated": "truncated context",
    "untrained": "untrained start",
    "wrong_prompt": "another document's prompt",
    "full_context": "full context",
    "recall": "soft prompt with recall",
    "retrieval": "retrieval, as many tokens",
    "retrieval_3x": "retrieval, three times as many",
    "retrieval_recall": "retrieval, as many as with recall",
}
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("kl", "KL", "mean KL divergence from the full context, nats per token; lower is better"),
    ("kl_p95", "KL p95", "95th percentile of the same"),
    ("kl_closed", "KL closed", "1 − KL / KL without context; 1 is the full context"),
    ("top1_agreement", "top-1", "how often the most probable token is the same"),
    ("top5_overlap", "top-5", "shared part of the five most probable tokens"),
    ("rank_correlation", "rank corr.", "Spearman over the full context's 20 most probable tokens"),
    ("entropy_gap", "entropy gap", "entropy minus that of the full context; negative is too sure"),
    ("nll", "gold NLL", "−log Pr of the gold answer, per token"),
    ("exact_match", "exact", "free-running answers equal to the gold answer"),
    ("token_f1", "F1", "token F1 of free-running answers"),
)
_STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--paper:#fff;--wash:#f6f8fa;--main:#0b6bcb;--other:#a8b3bf}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;--paper:#0d1117;--wash:#161b22;
--main:#58a6ff;--other:#4a545f}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1040px;margin:0 auto;padding:40px 24px 80px}h1{font-size:28px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 12px}p.lead{color:var(--soft);margin:0 0 28px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.card{background:var(--wash);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:26px;font-weight:650;line-height:1.2;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:13px}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:8px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:550}
tr.main td{font-weight:650;background:var(--wash)}.plots{display:grid;gap:20px;
grid-template-columns:repeat(auto-fit,minmax(420px,1fr))}figure{margin:0}figcaption{color:var(--soft);font-size:13px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
svg .axis{stroke:var(--line)}svg .bar{fill:var(--other)}svg .bar.main{fill:var(--main)}
svg .curve{fill:none;stroke:var(--main);stroke-width:2}svg .value{fill:var(--ink)}
article{border:1px solid var(--line);border-radius:10px;margin:14px 0;overflow:hidden}
article h3{font-size:15px;margin:0;padding:12px 16px;background:var(--wash);border-bottom:1px solid var(--line)}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr))}
.answers div{padding:12px 16px;white-space:pre-wrap;font-size:14px;overflow-wrap:anywhere}
.answers div+div{border-left:1px solid var(--line)}.answers em{display:block;font-style:normal;font-size:12px;
color:var(--soft);margin-bottom:4px}.answers .main em{color:var(--main);font-weight:600}
"""


def render_page(report: dict[str, Any], name: str = "") -> str:
    """The whole page. `report` is what report.json holds; every text in it is escaped."""
    heading = f"Soft prompt {escape(name)}" if name else "Fidelity report"
    objective = report.get("objective")
    lead = (
        f"{report['context_tokens']:,} tokens of context in {report['virtual_tokens']} virtual tokens "
        f"({report['compression_ratio']:.1f}×), kind {escape(str(report['kind']))}"
        f"{'' if objective is None else f', objective {escape(str(objective))}'}. Measured on "
        f"{report['evaluation']['questions']} questions that were kept out of training."
    )
    if report["segments"] > 1:
        lead += (
            f" The context is longer than the model's window: it was cut into {report['segments']} parts, and “full "
            f"context” is, for each question, the part that it is about."
        )
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{heading}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{heading}</h1><p class="lead">{lead}</p>{_verdict(report)}{_cards(report)}'
        f"{_right_answers(report)}"
        f"<h2>Against every baseline</h2>{_table(report)}"
        f'<h2>Plots</h2><div class="plots">{_plots(report)}</div>'
        f"<h2>Where it is faithful</h2>{_groups(report)}"
        f"<h2>Off-topic questions</h2>{_off_topic(report)}"
        f"<h2>Answers side by side</h2>{_answers(report)}"
        "</main></body></html>\n"
    )


def _verdict(report: dict[str, Any]) -> str:
    """Of a compression; an evaluation of an imported prompt has none."""
    found = report.get("verdict")
    if found is None:
        return ""
    asked = report["coverage"]
    return (
        f'<p class="verdict"><b>{escape(str(found))}</b></p><p class="lead">Its training asked about {asked["asked"]} '
        f"of the context's {asked['sentences']} sentences{_often(asked)}.</p>{_coverage(asked)}"
    )


def _often(asked: dict[str, Any]) -> str:
    """Nothing in reports of older code."""
    return f", about {asked['asked_often']} of them at least three times" if "asked_often" in asked else ""


def _coverage(asked: dict[str, Any]) -> str:
    """By place in the context."""
    rows = "".join(
        f"<tr><td>{escape(place)}</td><td>{row['sentences']}</td><td>{row['asked']}</td><td>{row['asked_often']}</td></tr>"
        for place, row in asked.get("by_place", {}).items()
    )
    if not rows:
        return ""
    head = "<tr><th>place in the context</th><th>sentences</th><th>asked about</th><th>three times or more</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _cards(report: dict[str, Any]) -> str:
    even = report.get("break_even_requests")
    shown = (
        (_number(report["kl_closed"], 3), "of the KL to the full context closed"),
        (_number(report["top1_agreement"], 3), "top-1 agreement"),
        (f"{report['compression_ratio']:.1f}×", "compression"),
        (_bytes(report["bytes"]), f"soft prompt; the context's KV takes {_bytes(report['context_kv_bytes'])}"),
        (_duration(report.get("seconds")), "to compress"),
        ("–" if even is None else f"{even:,}", "requests until it has paid for itself"),
    )
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in shown)
        + "</div>"
    )


def _rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("soft_prompt", report), *report["baselines"].items()]


def _table(report: dict[str, Any]) -> str:
    head = "".join(f'<th title="{escape(title)}">{label}</th>' for _, label, title in _COLUMNS)
    body = []
    for name, scores in _rows(report):
        cells = "".join(f"<td>{_number(scores.get(key), 3)}</td>" for key, _, _ in _COLUMNS)
        mark = ' class="main"' if name == "soft_prompt" else ""
        body.append(f"<tr{mark}><td>{escape(_LABELS.get(name, name))}</td>{cells}</tr>")
    notes = "".join(f"<li><b>{label}</b>: {escape(title)}</li>" for _, label, title in _COLUMNS)
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        f"</div><details><summary>What the columns mean</summary><ul>{notes}</ul></details>"
    )


def _right_answers(report: dict[str, Any]) -> str:
    """What a user can count on; nothing where no question says what is right."""
    rows = report.get("right_answers") or {}
    if not any("right" in row for row in rows.values()):
        return ""
    body = "".join(
        f"<tr{' class=main' if name == 'soft_prompt' else ''}><td>{escape(_LABELS[name])}</td>"
        f"<td>{row['right']} of {row['questions']}</td><td>{row['low']:.0%} to {row['high']:.0%}</td>"
        f"<td>{row['prompt_tokens']:,.0f}</td><td>{_milliseconds(row['first_token_seconds'])}</td></tr>"
        for name, row in rows.items()
    )
    return (
        '<h2>Right answers</h2><p class="lead">Answers, made by the engine that serves, that contain a text which the '
        "question accepts. The interval holds the true share with 95 % confidence. First token: of one request alone, "
        "when what it shares with others is in the cache.</p>"
        '<div class="scroll"><table><thead><tr><th></th><th>right</th><th>interval</th><th>prompt tokens</th>'
        f"<th>first token</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.0f} ms"


def _plots(report: dict[str, Any]) -> str:
    bars = [
        ("kl", "KL from the full context, nats per token (lower is better)"),
        ("top1_agreement", "Top-1 agreement with the full context"),
        ("token_f1", "Token F1 of free-running answers"),
    ]
    plots = []
    for key, caption in bars:
        rows = [(_LABELS.get(name, name), scores.get(key), name == "soft_prompt") for name, scores in _rows(report)]
        known = [(label, float(value), main) for label, value, main in rows if value is not None]
        if known:
            plots.append(f"<figure>{_bar_chart(known)}<figcaption>{escape(caption)}</figcaption></figure>")
    if len(report.get("curve", [])) > 1:
        plots.append(
            f"<figure>{_curve(report['curve'])}<figcaption>Training loss, by seconds of training</figcaption></figure>"
        )
    return "".join(plots)


def _bar_chart(rows: Sequence[tuple[str, float, bool]]) -> str:
    top = max(max(value for _, value, _ in rows), 1e-9)
    parts = [f'<svg viewBox="0 0 480 {len(rows) * 30 + 8}" role="img">']
    for index, (label, value, main) in enumerate(rows):
        y = index * 30 + 6
        width = max(0.0, value) / top * 230
        kind = "bar main" if main else "bar"
        parts.append(
            f'<text x="176" y="{y + 15}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="{kind}" x="184" y="{y}" width="{width:.1f}" height="20" rx="3"/>'
            f'<text class="value" x="{190 + width:.1f}" y="{y + 15}">{value:.3f}</text>'
        )
    return "".join(parts) + "</svg>"


def _curve(curve: Sequence[Sequence[float]]) -> str:
    seconds, losses = [row[1] for row in curve], [row[2] for row in curve]
    left, right, top, bottom = 48.0, 470.0, 10.0, 190.0
    high, low = max(losses), min(0.0, *losses)
    x = _scale(seconds[0], seconds[-1], left, right)
    y = _scale(low, high, bottom, top)
    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(seconds, losses, strict=True))
    marks = [
        f'<line class="axis" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2g}</text>'
        for value in (low, (low + high) / 2, high)
    ]
    ends = (
        f'<text x="{left}" y="{bottom + 18}">{seconds[0]:.0f} s</text>'
        f'<text x="{right}" y="{bottom + 18}" text-anchor="end">{seconds[-1]:.0f} s</text>'
    )
    line = f'<polyline class="curve" points="{points}"/>'
    return f'<svg viewBox="0 0 480 214" role="img">{"".join(marks)}{ends}{line}</svg>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _groups(report: dict[str, Any]) -> str:
    tables = []
    for key, heading in (("by_kind", "kind of question"), ("by_place", "place in the context")):
        if not report[key]:
            continue
        rows = "".join(
            f"<tr><td>{escape(group.replace('_', ' '))}</td><td>{found['questions']}</td>"
            f"<td>{_number(found['kl'], 3)}</td><td>{_number(found['kl_closed'], 3)}</td></tr>"
            for group, found in report[key].items()
        )
        head = f"<tr><th>{heading}</th><th>questions</th><th>KL</th><th>KL closed</th></tr>"
        tables.append(f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>')
    return f'<div class="plots">{"".join(tables)}</div>'


def _off_topic(report: dict[str, Any]) -> str:
    found = report["off_topic"]
    return (
        "<p>On questions that have nothing to do with the context, compared with the model without any context: "
        f"KL {_number(found['kl'], 3)} and top-1 agreement {_number(found['top1_agreement'], 3)} with the soft "
        f"prompt; {_number(found['kl_full_context'], 3)} and {_number(found['top1_agreement_full_context'], 3)} "
        "with the full context.</p>"
    )


def _answers(report: dict[str, Any]) -> str:
    parts = []
    for answer in report["answers"]:
        columns = "".join(
            f"<div{' class=main' if key == 'soft_prompt' else ''}><em>{escape(_LABELS[key])}</em>"
            f"{escape(answer[key])}</div>"
            for key in ("full_context", "soft_prompt", "no_context", "recall", "retrieval_3x")
            if key in answer
        )
        heading = escape(answer["input"])
        if answer.get("right") is not None:
            heading += f" <small>(right: {escape(answer['gold'])})</small>"
        parts.append(f'<article><h3>{heading}</h3><div class="answers">{columns}</div></article>')
    return "".join(parts) or "<p>No free answers were asked for.</p>"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
