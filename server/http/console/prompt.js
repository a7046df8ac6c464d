// One soft prompt: what it is, how faithful it was found to be, and what can be done with it.

import { download, getJson, refuse } from "./api.js";
import { confirmed, h } from "./dom.js";
import { bytes, count, date, decimal, percent, ratio, seconds } from "./format.js";
import { Plot } from "./plots.js";

const LABELS = {
  no_context: "No context",
  truncated: "Truncated context",
  untrained: "Untrained start",
  wrong_prompt: "Another document's prompt",
  full_context: "Full context",
};
const COLUMNS = [
  ["kl", "KL", "Mean KL divergence from the full context, nats per token; lower is better"],
  ["kl_closed", "KL closed", "1 is the full context, 0 no context"],
  ["top1_agreement", "Top-1", "How often the most probable token is the same"],
  ["token_f1", "F1", "Token F1 of answers written freely"],
];
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export async function showPrompt(place, name) {
  const path = `v1/soft_prompts/${encodeURIComponent(name)}`;
  const prompt = await getJson(path);
  const { manifest } = prompt;
  const report = manifest.fidelity || {};
  const problem = h("p.notice.bad", { role: "alert", hidden: true });
  const remove = async () => {
    const sure = await confirmed(`Delete ${name}?`,
      "Requests that use it are served to their end. The file is gone then, unless you have downloaded it.", "Delete it");
    if (!sure) return;
    try {
      await getJson(path, { method: "DELETE" });
      location.hash = "prompts";
    } catch (error) {
      refuse(problem, error);
    }
  };
  const length = prompt.context_tokens;
  const plots = [];
  place.append(
    h("p.crumb", {}, h("a", { href: "console#prompts" }, "Soft prompts")),
    h(".heading", {}, h("h1", {}, prompt.name),
      h(".row", {},
        h("a.button.primary", { href: `console#ask/${encodeURIComponent(name)}` }, "Ask it"),
        h("button.quiet", { type: "button", onclick: () => download(`${path}/content`, `${name}.safetensors`).catch((error) => refuse(problem, error)) }, "Download"),
        h("button.quiet.danger", { type: "button", onclick: remove }, "Delete"))),
    h("p.lead", {}, length
      ? `${count(length)} tokens of context in ${count(prompt.num_virtual_tokens)} virtual ones, ${ratio(length / prompt.num_virtual_tokens)} shorter.`
      : `${count(prompt.num_virtual_tokens)} virtual tokens; how long the context was is not known.`),
    problem,
    prompt.preview ? h("p.notice", {}, "A preview: requests may use it, and when its compression ends the trained one takes its place.") : "",
    prompt.verdict ? h(isPoor(prompt.verdict) ? "p.verdict.poor" : "p.verdict", {}, prompt.verdict) : "",
    figures(report),
    comparison(report),
    curve(report, plots),
    answers(report),
    facts(prompt),
  );
  for (const [plot, x, y] of plots) plot.show(x, y);
  return () => plots.forEach(([plot]) => plot.remove());
}

function figures(report) {
  const shown = [
    [isNumber(report.kl_closed) && percent(report.kl_closed), "of the way from no context to the full one (KL closed)"],
    [isNumber(report.top1_agreement) && percent(report.top1_agreement), "of tokens: the same first choice"],
    [isNumber(report.context_prefill_seconds) && seconds(report.context_prefill_seconds), "of reading saved for each request"],
    [isNumber(report.bytes) && bytes(report.bytes),
      isNumber(report.context_kv_bytes) ? `instead of ${bytes(report.context_kv_bytes)} in the KV cache` : "in the KV cache"],
    [isNumber(report.break_even_requests) && count(report.break_even_requests), "requests until it has paid for itself"],
    [isNumber(report.seconds) && seconds(report.seconds), "to compress"],
  ].filter(([value]) => value);
  if (!shown.length)
    return h("p.empty", {}, "This file brings no measured fidelity. `softbatch evaluate` measures it beside the full context.");
  return h("section.figures", { "aria-label": "Fidelity" },
    shown.map(([value, words]) => h("div", {}, h("b", {}, value), h("span", {}, words))));
}

function comparison(report) {
  if (!report.baselines || typeof report.baselines !== "object") return "";
  const rows = [["This soft prompt", report, true],
    ...Object.entries(report.baselines).map(([key, scores]) => [LABELS[key] || key, scores || {}, false])];
  const most = Math.max(1e-9, ...rows.map(([, scores]) => (isNumber(scores.kl) ? scores.kl : 0)));
  return h("section", {}, h("h2", {}, "Beside what else could stand there"),
    h(".scroll", { tabIndex: 0, role: "region", "aria-label": "Comparison" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "In front of the question"), h("th.wide", { scope: "col" }, "Distance"),
        COLUMNS.map(([, label, words]) => h("th.number", { scope: "col", title: words }, label)))),
      h("tbody", {}, rows.map(([label, scores, own]) => {
        const bar = h(".bar", { "aria-hidden": "true" }, h("i"));
        bar.style.setProperty("--part", String(isNumber(scores.kl) ? scores.kl / most : 0));
        return h(own ? "tr.own" : "tr", {}, h("th", { scope: "row" }, label), h("td.wide", {}, bar),
          COLUMNS.map(([key]) => h("td.number", {}, isNumber(scores[key]) ? decimal(scores[key]) : "–")));
      })))),
    h("p.hint", {}, "KL: how far the next token's distribution is from the full context's, in nats. Lower is better."));
}

function curve(report, plots) {
  const points = Array.isArray(report.curve) ? report.curve.filter((point) => Array.isArray(point) && point.every(isNumber)) : [];
  if (points.length < 2) return "";
  const plot = new Plot({ title: "Training loss", of: "by seconds of training", format: (value) => value.toFixed(2), time: false, height: 180 });
  plots.push([plot, points.map((point) => point[1]), points.map((point) => point[2])]);
  return h("section.plots.one", { "aria-label": "Training" }, plot.element);
}

function answers(report) {
  if (!Array.isArray(report.answers) || !report.answers.length) return "";
  const column = (label, words, own) => h(own ? ".own" : "div", {}, h("h4", {}, label), h("p", {}, String(words ?? "")));
  return h("section", {}, h("h2", {}, "Answers side by side"),
    report.answers.map((answer) => h("article.answers", {}, h("h3", {}, String(answer.input)),
      h("", {}, column("Full context", answer.full_context), column("This soft prompt", answer.soft_prompt, true),
        column("No context", answer.no_context)))));
}

function facts({ manifest, sha256, bytes: size, created, resident, kind }) {
  const known = {
    Kind: kind,
    "Made for": manifest.model.name,
    Objective: manifest.objective,
    "Stands for": manifest.replaces === "system" ? "the system turn" : "nothing: it stands in front of everything",
    Source: manifest.source,
    File: bytes(size),
    Registered: date(created),
    Memory: resident ? "resident: the next request finds it in the KV cache" : "on disk: its first request loads it",
    "SHA-256": sha256,
  };
  return h("section", {}, h("h2", {}, "The file"), h("dl.facts", {},
    Object.entries(known).filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]).flat()));
}

/** A verdict begins with its word. */
const isPoor = (verdict) => /^(too short|learned nothing|weak)\b/.test(verdict);
