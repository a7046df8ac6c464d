// An answer token by token: how probable each was, and what else the model might have said.

import { h } from "./dom.js";
import { percent } from "./format.js";

export class TokenText {
  constructor() {
    this.element = h(".tokens", { tabIndex: 0, role: "group", "aria-label": "Answer. Arrow keys go through its tokens." });
    this.tip = h(".tip", { role: "status", hidden: true });
    this.clear();
    // A page that scrolls to what has the focus moves below a pointer that rests: what the keys have chosen stays.
    const rests = (event) => this.byKey && !event.movementX && !event.movementY;
    this.element.addEventListener("pointerover", (event) => rests(event) || this.select(event.target.closest("span")));
    this.element.addEventListener("pointerleave", (event) => rests(event) || this.select(null));
    this.element.addEventListener("blur", () => this.select(null));
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    this.onResize = () => this.selected && this.place();
    addEventListener("resize", this.onResize);
  }

  close() {
    removeEventListener("resize", this.onResize);
    this.tip.remove();
  }

  clear() {
    this.byKey = false;
    this.decoder = new TextDecoder();
    this.known = [];
    this.selected = null;
    this.element.replaceChildren();
    this.tip.hidden = true;
  }

  /** Tokens as the server streams them. A character may take several: it shows with the last of them. */
  push(tokens) {
    for (const token of tokens) {
      if (!token.bytes || !token.bytes.length) continue;
      const words = this.decoder.decode(new Uint8Array(token.bytes), { stream: true });
      const probability = Math.exp(token.logprob);
      const span = h("span", {}, words);
      span.style.setProperty("--doubt", (1 - probability).toFixed(3));
      this.known.push({ span, token, probability });
      this.element.append(span);
    }
  }

  finish() {
    const rest = this.decoder.decode();
    if (rest) this.element.append(rest);
  }

  onKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.select(null);
    if (!step || !this.known.length) return;
    event.preventDefault();
    const at = this.known.findIndex(({ span }) => span === this.selected);
    const next = Math.min(Math.max(at + step, 0), this.known.length - 1);
    this.select(this.known[next].span, true);
  }

  select(span, byKey = false) {
    this.byKey = byKey;
    this.selected?.classList.remove("on");
    const found = this.known.find((one) => one.span === span);
    this.selected = found ? span : null;
    this.tip.hidden = !found;
    if (!found) return;
    span.classList.add("on");
    this.fill(found);
    // Beside the place rather than inside: what the pointer is over must not change the text below it.
    if (!this.tip.isConnected) document.body.append(this.tip);
    this.place();
  }

  place() {
    this.tip.style.setProperty("left", "0px"); // near the window's edge it would be measured narrower than it becomes
    const box = this.selected.getBoundingClientRect();
    const width = this.tip.offsetWidth;
    const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - width - 8);
    const above = box.top - this.tip.offsetHeight - 8;
    this.tip.style.setProperty("left", `${left + scrollX}px`);
    this.tip.style.setProperty("top", `${(above > 0 ? above : box.bottom + 8) + scrollY}px`);
  }

  fill({ token, probability }) {
    const others = token.top_logprobs.filter((other) => other.token !== token.token);
    this.tip.replaceChildren(
      h("p", {}, h("b", {}, shown(token.token)), ` ${share(probability)}`),
      ...others.map((other) => {
        const bar = h(".bar", { "aria-hidden": "true" }, h("i"));
        bar.style.setProperty("--part", String(Math.exp(other.logprob)));
        return h("p.other", {}, h("span", {}, shown(other.token)), bar, h("span", {}, share(Math.exp(other.logprob))));
      }),
    );
  }
}

/** White space too is something to be seen. */
const shown = (token) => token.replaceAll("\n", "⏎").replace(/^ | $/g, "␣") || "␣";
const share = (probability) => (probability < 0.005 ? "under 1 %" : percent(probability));
