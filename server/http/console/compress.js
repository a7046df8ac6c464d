// Compress: a text becomes a soft prompt. The form, and the jobs below it.

import { postJson, refuse } from "./api.js";
import { drafts, kept, takesFiles } from "./drafts.js";
import { h, text } from "./dom.js";
import { plural, ratio } from "./format.js";
import { Jobs } from "./jobs.js";

export const title = "Compress";
const MAX_COUNTED_CHARS = 1 << 20;

const LENGTHS = [
  ["16", "16", "a page or less; the smallest file"],
  ["64", "64", "a manual of a few thousand tokens"],
  ["128", "128", "dense texts: tables, numbers, many names"],
  ["256", "256", "long contexts; costs each request most"],
];
const OBJECTIVES = [
  ["kl", "Its doubts", "KL: how probable each next word is, not only which; right for most uses"],
  ["nll", "Its answers", "NLL: the very words that it answers with the text in front"],
  ["mixed", "Both", "half of each"],
];
const MINUTES = [
  ["2", "2 min", "a try: shows whether it is worth more"],
  ["10", "10 min", "good for a manual on two cores"],
  ["30", "30 min", "closer still; for texts you will ask about for long"],
  ["120", "2 h", "long contexts"],
];

export async function show(place) {
  const jobs = new Jobs();
  place.append(
    h("h1", {}, "Compress"),
    h("p.lead", {}, "Give the model a text to learn by heart. Afterwards every question about it costs a few tokens instead of thousands."),
    form(jobs), jobs.element,
  );
  await jobs.start();
  return () => jobs.stop();
}

function form(jobs) {
  const name = kept(h("input", { id: "name", required: true, maxLength: 128, autocomplete: "off" }), "name");
  const context = kept(h("textarea", { id: "context", rows: 9, required: true, placeholder: "Paste a text, or drop a file here." }), "context");
  const length = h("p.hint", { id: "context-length", role: "status" }, "Nothing yet.");
  context.setAttribute("aria-describedby", "context-length");
  const questions = h("textarea", { id: "questions", rows: 4, placeholder: "One a line" });
  const lengths = choice("virtual_tokens", "Length in virtual tokens", LENGTHS, "64", { min: 2, max: 65536, step: 1 });
  const objectives = choice("objective", "What it should keep", OBJECTIVES, "kl");
  const minutes = choice("minutes", "Time to learn", MINUTES, "10", { min: 0.1, max: 43200, step: "any", unit: "minutes" });
  const preview = h("input", { id: "preview", type: "checkbox" });
  const problem = h("p.notice.bad", { role: "alert", hidden: true });
  const button = h("button.primary.large", { type: "submit" }, "Compress");
  const take = takesFiles(context, (file) => {
    if (!name.value) name.value = drafts.name = file.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]+/g, "-");
  });
  const open = h("input.unseen", { id: "context-file", type: "file", accept: "text/*,.md,.txt,.rst,.html,.csv,.json" });
  open.addEventListener("change", () => open.files.length && take(open.files[0]));
  const element = h("form.compress", {},
    h("div.text", {},
      h(".row.between", {}, h("label", { htmlFor: "context" }, "Text"),
        h("span", {}, open, h("label.button.quiet.small", { htmlFor: "context-file" }, "Open a file"))),
      context, length,
      h("label", { htmlFor: "name" }, "Name"), name, h("p.hint", {}, "What requests will call it."),
      h("details", {}, h("summary", {}, "Questions of your own"),
        h("label.unseen", { htmlFor: "questions" }, "Questions of your own"), questions,
        h("p.hint", {}, "What will really be asked. It trains on these beside those that it makes of the text."))),
    h("div.settings", {}, lengths.element, objectives.element, minutes.element,
      h("fieldset", {}, h("legend", {}, "Until it is trained"),
        h("label.choice", { htmlFor: "preview" }, preview, h("b", {}, "Preview"), h("span", {}, "can be asked before it is trained; the trained one takes its place"))),
      problem, button));
  const count = counter(context, length, () => Number(lengths.value()));
  lengths.element.addEventListener("change", count);
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    problem.hidden = true;
    button.disabled = true;
    try {
      const job = await postJson("v1/compressions", {
        name: name.value.trim(),
        context: context.value,
        objective: objectives.value(),
        virtual_tokens: Number(lengths.value()),
        minutes: Number(minutes.value()),
        preview: preview.checked,
        questions: questions.value.split("\n").map((line) => line.trim()).filter(Boolean).map((input) => ({ input })),
      });
      await jobs.follow(job);
    } catch (error) {
      refuse(problem, error);
    } finally {
      button.disabled = false;
    }
  });
  return element;
}

/** Radio buttons whose meaning stands beside them; with `other`, a number of one's own too. */
function choice(name, legend, options, chosen, other = null) {
  const radios = options.map(([value, label, meaning]) => {
    const id = `${name}-${value}`;
    return h("label.choice", { htmlFor: id },
      h("input", { type: "radio", name, id, value, checked: value === chosen }), h("b", {}, label), h("span", {}, meaning));
  });
  const element = h("fieldset", {}, h("legend", {}, legend), radios);
  let number = null;
  if (other) {
    number = h("input", { type: "number", min: other.min, max: other.max, step: other.step, "aria-label": `${legend}: another number` });
    const radio = h("input", { type: "radio", name, id: `${name}-other`, value: "" });
    number.addEventListener("input", () => {
      radio.checked = true;
      number.required = true;
    });
    element.addEventListener("change", () => (number.required = radio.checked));
    element.append(h("label.choice", { htmlFor: `${name}-other` }, radio, h("b", {}, "Other"), h("span", {}, number, other.unit ? ` ${other.unit}` : "")));
  }
  const value = () => element.querySelector("input[type=radio]:checked").value || number.value;
  return { element, value };
}

/** How long the text is, and how much shorter it gets; asked of the server once the typing rests. */
function counter(context, place, target) {
  let timer = 0;
  let known = { value: null, count: 0 };
  const show = async () => {
    const value = context.value;
    if (!value.trim()) return text(place, "Nothing yet.");
    if (value.length > MAX_COUNTED_CHARS) return text(place, `${plural(value.length, "character")}.`);
    try {
      if (known.value !== value) known = { value, count: (await postJson("tokenize", { prompt: value })).count };
      const shorter = known.count / target();
      text(place, `${plural(known.count, "token")}${shorter > 1 ? `, ${ratio(shorter)} shorter as ${target()} virtual ones` : ", no more than the soft prompt would have"}.`);
    } catch (error) {
      text(place, error.message);
    }
  };
  context.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(show, 400);
  });
  if (context.value) show();
  return show;
}
