// One column of Ask: what stands in front of the question, the answer as it comes, and its price.

import { events } from "./api.js";
import { h, text } from "./dom.js";
import { count, rate, seconds } from "./format.js";
import { Pace } from "./pace.js";
import { TokenText } from "./tokens.js";

const ALTERNATIVES = 5;
let number = 0;

export class Answer {
  constructor(options, target, changed, removed) {
    const id = `target-${(number += 1)}`;
    this.target = target;
    this.select = h("select", { id }, options.map(([value, label]) => h("option", { value, selected: value === target }, label)));
    this.select.addEventListener("change", () => {
      this.target = this.select.value;
      this.clear();
      changed();
    });
    this.close_ = h("button.quiet.icon", { type: "button", "aria-label": "Remove this column", onclick: removed }, "×");
    this.text = new TokenText();
    this.problem = h("p.notice.bad", { role: "alert", hidden: true });
    this.figures = {
      first: h("dd", {}, "–"), pace: h("dd", {}, "–"), paid: h("dd.paid", {}, "–"),
    };
    this.detail = h("small");
    this.bar = h(".bar.thick", { "aria-hidden": "true" }, h("i"));
    this.element = h("article.answer", {},
      h(".row.between", {}, h("label.unseen", { htmlFor: id }, "In front of the question"), this.select, this.close_),
      this.text.element, this.problem,
      h("dl.price", {},
        h("", {}, h("dt", {}, "First token"), this.figures.first),
        h("", {}, h("dt", {}, "Tokens/s"), this.figures.pace),
        h("", {}, h("dt", {}, "Prompt tokens"), this.figures.paid)),
      this.bar, this.detail);
  }

  removable(is) {
    this.close_.hidden = !is;
  }

  close() {
    this.text.close();
  }

  clear() {
    this.paid = this.first = null;
    this.problem.hidden = true;
    this.text.clear();
    for (const figure of Object.values(this.figures)) text(figure, "–");
    this.figures.pace.classList.remove("words");
    text(this.detail, "");
    this.showShare(0);
  }

  showShare(part) {
    this.bar.style.setProperty("--part", String(part));
  }

  async ask({ question, context, max_tokens, temperature, signal }) {
    if (signal.aborted) return;
    this.clear();
    this.element.setAttribute("aria-busy", "true");
    const began = performance.now();
    const since = () => (performance.now() - began) / 1000;
    const pace = new Pace();
    try {
      const body = this.request(question, context, max_tokens, temperature);
      for await (const event of events("v1/chat/completions", { body, signal })) {
        const choice = event.choices[0];
        const tokens = choice?.logprobs?.content || [];
        if (tokens.length) {
          this.first ??= since();
          pace.take(tokens.length, since());
          this.text.push(tokens);
          text(this.figures.first, seconds(this.first));
          text(this.figures.pace, rate(pace.rate));
        }
        if (event.usage) this.showUsage(event.usage);
      }
      this.text.finish();
      if (pace.rate === null) text(this.figures.pace, "too short to tell");
      this.figures.pace.classList.toggle("words", pace.rate === null);
    } catch (error) {
      if (error.name === "AbortError") text(this.detail, "Stopped.");
      else {
        this.problem.hidden = false;
        text(this.problem, error.message);
      }
    } finally {
      this.element.removeAttribute("aria-busy");
    }
  }

  request(question, context, max_tokens, temperature) {
    const turns = [{ role: "user", content: question }];
    if (this.target === "full" && context.trim()) turns.unshift({ role: "system", content: context });
    return {
      messages: turns, max_tokens, temperature, stream: true, stream_options: { include_usage: true },
      logprobs: true, top_logprobs: ALTERNATIVES,
      ...(this.target.startsWith("soft:") ? { soft_prompt: this.target.slice(5) } : {}),
    };
  }

  showUsage(usage) {
    this.paid = usage.prompt_tokens;
    text(this.figures.paid, count(this.paid));
    const cached = usage.prompt_tokens_details?.cached_tokens || 0;
    if (!cached) text(this.detail, `all ${count(this.paid)} computed for this answer`);
    else text(this.detail, `${count(cached)} of them were in the KV cache`);
  }
}
