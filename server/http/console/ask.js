// Ask: one question to up to three contexts, side by side, and what each of the answers has cost.

import { getJson } from "./api.js";
import { Answer } from "./answer.js";
import { kept, takesFiles } from "./drafts.js";
import { h, text } from "./dom.js";
import { count, plural, ratio } from "./format.js";

export const title = "Ask";
const MAX_ANSWERS = 3;
const NONE = "none";
const FULL = "full";

export async function show(place, wanted) {
  const { data: prompts } = await getJson("v1/soft_prompts");
  const answers = [];
  const row = h(".answers-row");
  const question = kept(h("textarea", { id: "question", rows: 2, required: true, placeholder: "What should it answer?" }), "question");
  const context = kept(h("textarea", { id: "full-context", rows: 6, placeholder: "The text that the full context stands for" }), "context");
  const tokens = h("input", { id: "max-tokens", type: "number", min: 1, max: 4096, value: 128 });
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: 0.1, value: 0 });
  const together = h("input", { id: "together", type: "checkbox" });
  const doubts = h("input", { id: "doubts", type: "checkbox", checked: true });
  const button = h("button.primary.large", { type: "submit" }, "Ask");
  const stop = h("button.quiet", { type: "button", hidden: true }, "Stop");
  const more = h("button.quiet", { type: "button" }, "One more beside");
  const key = h("p.hint.key", {}, h("i.sure"), "sure", h("i.unsure"), "unsure of this token; point at one to see what else might have stood there");
  const saying = h("p.lead.saying", { role: "status" });
  const pasted = h(".field", {}, h("label", { htmlFor: "full-context" }, "Full context"), context,
    h("p.hint", {}, "Paste the text, or drop a file. It is sent in front of the question, as the system turn."));
  const options = [
    ...prompts.map((prompt) => [`soft:${prompt.name}`, `Soft prompt: ${prompt.name}`]),
    [FULL, "The full context, pasted"], [NONE, "No context"],
  ];

  const arrange = () => {
    pasted.hidden = !answers.some((answer) => answer.target === FULL);
    more.hidden = answers.length >= MAX_ANSWERS;
    for (const answer of answers) answer.removable(answers.length > 1);
    row.style.setProperty("--columns", String(answers.length));
  };
  const add = (target) => {
    const answer = new Answer(options, target, arrange, () => {
      answers.splice(answers.indexOf(answer), 1);
      answer.element.remove();
      arrange();
    });
    answers.push(answer);
    row.append(answer.element);
    arrange();
  };
  const first = prompts.find((prompt) => prompt.name === wanted) || prompts[0];
  for (const target of [...(first ? [`soft:${first.name}`] : []), FULL, NONE]) add(target);

  let asking = null;
  const form = h("form.question", {},
    h("label", { htmlFor: "question" }, "Question"), question,
    pasted,
    h(".row.options", {},
      button, stop, more,
      h("label.inline", { htmlFor: "max-tokens" }, "Tokens at most", tokens),
      h("label.inline", { htmlFor: "temperature" }, "Temperature", temperature),
      h("label.inline", { htmlFor: "together" }, together, "All at once"),
      h("label.inline", { htmlFor: "doubts" }, doubts, "Show doubts")));
  more.addEventListener("click", () => add(NONE));
  stop.addEventListener("click", () => asking?.abort());
  doubts.addEventListener("change", () => {
    row.classList.toggle("doubts", doubts.checked);
    key.hidden = !doubts.checked;
  });
  row.classList.add("doubts");
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  takesFiles(context);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    asking = new AbortController();
    button.disabled = true;
    stop.hidden = false;
    text(saying, "");
    const input = {
      question: question.value, context: context.value, max_tokens: Number(tokens.value),
      temperature: Number(temperature.value), signal: asking.signal,
    };
    for (const answer of answers) answer.clear();
    if (together.checked) await Promise.all(answers.map((answer) => answer.ask(input)));
    else for (const answer of answers) await answer.ask(input);
    weigh(answers);
    text(saying, bargain(answers, prompts));
    button.disabled = false;
    stop.hidden = true;
    asking = null;
  });
  place.append(
    h("h1", {}, "Ask"),
    h("p.lead", {}, "The same question with a soft prompt, with the whole text, and with nothing in front. In turn, so that none slows another."),
    form, saying, key, row,
  );
  return () => {
    asking?.abort();
    for (const answer of answers) answer.close();
  };
}

/** Bars of what was paid, on one scale. */
function weigh(answers) {
  const most = Math.max(1, ...answers.map((answer) => answer.paid || 0));
  for (const answer of answers) answer.showShare((answer.paid || 0) / most);
}

/** What the comparison comes to, in one sentence. */
function bargain(answers) {
  const soft = answers.find((answer) => answer.target.startsWith("soft:") && answer.paid);
  const full = answers.find((answer) => answer.target === FULL && answer.paid);
  if (!soft || !full || full.paid <= soft.paid) return "";
  const sooner = soft.first && full.first && full.first > soft.first * 1.05 ? `, and its first token came ${ratio(full.first / soft.first)} sooner` : "";
  return `${plural(soft.paid, "prompt token")} instead of ${count(full.paid)}: ${ratio(full.paid / soft.paid)} fewer${sooner}.`;
}
