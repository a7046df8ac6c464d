// Compression jobs: the running one live with its phases and its loss, the others as they ended.

import { events, getJson, refuse } from "./api.js";
import { announce, h, keyed, set, text } from "./dom.js";
import { date, percent, seconds } from "./format.js";
import { Plot } from "./plots.js";

const PHASES = {
  loading: "Load the model",
  self_study: "Ask about the text",
  gold: "Write the answers",
  estimate: "Plan the time",
  teacher: "Read the full context",
  matching: "Match its attention",
  training: "Train",
  evaluation: "Measure fidelity",
};
const ORDER = Object.keys(PHASES);
const FINAL = new Set(["succeeded", "failed", "cancelled"]);
const POLL_MS = 3000;
// By job, so that a look at another tab loses nothing of the curve.
const curves = new Map();

export class Jobs {
  constructor() {
    this.list = h(".jobs");
    this.problem = h("p.notice.bad", { role: "alert", hidden: true });
    this.heading = h("h2", { hidden: true }, "Compressions");
    this.element = h("section", {}, this.heading, this.problem, this.list);
    this.streams = new Map();
    this.awaited = new Set();
    this.cards = new Map();
  }

  async start() {
    await this.poll();
    this.timer = setInterval(() => this.poll(), POLL_MS);
  }

  stop() {
    clearInterval(this.timer);
    for (const stream of this.streams.values()) stream.abort();
    for (const card of this.cards.values()) card.plot.remove();
  }

  /** Land on the report when this one has succeeded. */
  async follow(job) {
    this.awaited.add(job.id);
    await this.poll();
    this.list.querySelector(".job")?.scrollIntoView({ block: "center", behavior: "smooth" });
  }

  async poll() {
    try {
      const { data } = await getJson("v1/compressions");
      this.problem.hidden = true;
      this.heading.hidden = !data.length;
      keyed(this.list, data, (job) => job.id, (job) => this.make(job), (_, job) => this.cards.get(job.id).show(job));
      for (const job of data) if (job.status === "running" && !this.streams.has(job.id)) this.watch(job);
    } catch (error) {
      refuse(this.problem, error);
    }
  }

  make(job) {
    const card = new JobCard(job);
    this.cards.set(job.id, card);
    return card.element;
  }

  async watch(job) {
    const stream = new AbortController();
    this.streams.set(job.id, stream);
    this.awaited.add(job.id);
    try {
      for await (const now of events(`v1/compressions/${job.id}/events`, { signal: stream.signal })) {
        this.cards.get(job.id)?.show(now);
        if (!FINAL.has(now.status)) continue;
        announce(`${now.name}: ${now.status}`);
        if (now.status === "succeeded" && this.awaited.has(now.id)) location.hash = `prompts/${encodeURIComponent(now.soft_prompt)}`;
      }
    } catch {
      // The next poll looks again.
    } finally {
      this.streams.delete(job.id);
    }
  }
}

class JobCard {
  constructor(job) {
    this.id = job.id;
    this.state = h("span.tag");
    this.words = h("p.hint");
    this.left = h("b.left", {}, "Starting");
    this.note = h("p.notice", { hidden: true });
    this.preview = h("p.hint", { hidden: true }, "Its ", h("a", { href: `console#ask/${encodeURIComponent(job.name)}` }, "preview"), " can be asked already.");
    this.bar = h(".bar.thick", { role: "progressbar", "aria-label": `Compression of ${job.name}`, "aria-valuemin": "0", "aria-valuemax": "100" }, h("i"));
    this.phases = h("ol.phases", {}, ORDER.map((phase) => h("li", { data: { phase } }, PHASES[phase])));
    this.plot = new Plot({ title: "Loss", of: "by seconds of the run", format: (value) => value.toFixed(3), time: false, height: 150 });
    this.plot.element.hidden = true;
    this.problem = h("p.notice.bad", { role: "alert", hidden: true });
    this.cancel = h("button.quiet.danger", { type: "button", onclick: () => this.stop() }, "Cancel");
    this.report = h("a.button.quiet", {}, "Report");
    this.live = h(".live", {}, h(".row.between", {}, this.left, h("span")), this.bar, this.phases, this.plot.element);
    this.element = h("article.job", {},
      h(".row.between", {}, h("h3", {}, job.name), h(".row", {}, this.state, this.cancel, this.report)),
      this.words, this.preview, this.note, this.live, this.problem);
  }

  async stop() {
    this.cancel.disabled = true;
    try {
      this.show(await getJson(`v1/compressions/${this.id}/cancel`, { method: "POST" }));
    } catch (error) {
      refuse(this.problem, error);
    } finally {
      this.cancel.disabled = false;
    }
  }

  show(job) {
    const { status, progress } = job;
    this.element.dataset.status = status;
    text(this.state, status);
    this.cancel.hidden = FINAL.has(status);
    this.live.hidden = status !== "running";
    this.report.hidden = status !== "succeeded";
    if (job.soft_prompt) set(this.report, { href: `console#prompts/${encodeURIComponent(job.soft_prompt)}` });
    text(this.words, sentence(job));
    this.preview.hidden = status !== "running" || !job.preview;
    if (progress && !FINAL.has(status)) this.showProgress(progress);
    else this.note.hidden = true;
  }

  showProgress(progress) {
    const { phase, done, total, loss, elapsed, expected, note } = progress;
    const part = expected ? Math.min(1, elapsed / expected) : total ? done / total : 0;
    const rest = expected ? Math.max(0, expected - elapsed) : null;
    const left = rest >= 1 ? `About ${seconds(rest)} left` : "Longer than planned, the end is near";
    text(this.left, rest === null ? "Finding out how long it will take" : left);
    this.bar.style.setProperty("--part", String(part));
    set(this.bar, { "aria-valuenow": String(Math.round(part * 100)) });
    const at = ORDER.indexOf(phase === "preview" ? "gold" : phase); // made of the first answers
    for (const [index, item] of [...this.phases.children].entries()) {
      item.dataset.is = index < at ? "past" : index === at ? "now" : "future";
      if (index === at) item.setAttribute("aria-current", "step");
      else item.removeAttribute("aria-current");
      item.style.setProperty("--part", index === at && total ? String(done / total) : "0");
    }
    this.note.hidden = !note;
    text(this.note, note || "");
    const curve = curves.get(this.id) || [[], []];
    curves.set(this.id, curve);
    if (loss !== null && phase === "training" && curve[0].at(-1) !== elapsed) {
      curve[0].push(elapsed ?? done);
      curve[1].push(loss);
    }
    this.plot.element.hidden = curve[0].length < 2;
    if (curve[0].length > 1) this.plot.show(...curve);
  }
}

function sentence(job) {
  if (job.status === "queued") return "Waits for the one before it.";
  if (job.status === "running") return `Since ${date(job.started_at)}, at low priority beside serving.`;
  if (job.status === "failed") return job.error ? job.error.message : "It failed.";
  if (job.status === "cancelled") return `Cancelled ${date(job.finished_at)}.`;
  const closed = job.fidelity && job.fidelity.kl_closed;
  const verdict = job.fidelity && job.fidelity.verdict;
  const took = job.started_at ? ` in ${seconds(job.finished_at - job.started_at)}` : "";
  return verdict || `Finished${took}${typeof closed === "number" ? `, ${percent(closed)} of the KL closed` : ""}.`;
}
