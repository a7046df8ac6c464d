// Soft prompts: all there are, and how another one gets here.

import { getJson, refuse, send } from "./api.js";
import { announce, h } from "./dom.js";
import { bytes, count, date, percent, ratio } from "./format.js";
import { showPrompt } from "./prompt.js";

export const title = "Soft prompts";
const COLUMNS = ["Name", "Kind", "Tokens", "Ratio", "Size", "Fidelity", "Memory"];

export async function show(place, name) {
  if (name) return showPrompt(place, name);
  const list = h("section", { "aria-label": "Registered soft prompts" });
  place.append(
    h("h1", {}, "Soft prompts"),
    h("p.lead", {}, "Long contexts, each learned once into a few virtual tokens. Name one as the model of a request."),
    list, uploadForm(() => fill(list)),
  );
  await fill(list);
  const timer = setInterval(() => fill(list).catch(() => {}), 5000);
  return () => clearInterval(timer);
}

async function fill(list) {
  const { data, broken } = await getJson("v1/soft_prompts");
  const known = JSON.stringify([data, broken]);
  if (list.known === known) return;
  list.known = known;
  const rows = data.map(row);
  list.replaceChildren(
    rows.length
      ? h(".prompts", { role: "table", "aria-label": "Soft prompts" },
          h(".prompts-row.head", { role: "row" }, COLUMNS.map((name) => h("span", { role: "columnheader" }, name))), rows)
      : h("p.empty", {}, "There is none yet. ", h("a", { href: "console#compress" }, "Compress a text"),
          ", or bring a file."),
    ...(broken || []).map(({ name, reason }) => h("p.notice.bad", {}, h("b", {}, name), ` cannot be used: ${reason}`)),
  );
}

function row(prompt) {
  const length = prompt.context_tokens;
  const cell = (label, ...parts) => h("span", { role: "cell", data: { label } }, ...parts);
  return h(".prompts-row", { role: "row" },
    h("span.name", { role: "cell" },
      h("a", { href: `console#prompts/${encodeURIComponent(prompt.name)}` }, prompt.name),
      prompt.preview ? h("span.tag", { title: "Not trained yet; when its compression ends, the trained one takes its place" }, "preview") : null,
      h("small", {}, prompt.verdict || `since ${date(prompt.created)}`)),
    cell("Kind", prompt.kind),
    cell("Tokens", count(prompt.num_virtual_tokens), length ? h("small", {}, `for ${count(length)}`) : null),
    cell("Ratio", length ? ratio(length / prompt.num_virtual_tokens) : "–"),
    cell("Size", bytes(prompt.bytes)),
    cell("Fidelity", prompt.kl_closed === null ? "not measured" : percent(prompt.kl_closed)),
    cell("Memory", h("span.tag", { data: { on: String(prompt.resident) } }, prompt.resident ? "resident" : "on disk")));
}

function uploadForm(done) {
  const name = h("input", { id: "upload-name", autocomplete: "off", required: true, maxLength: 128 });
  const file = h("input", { id: "upload-file", type: "file", multiple: true, required: true, accept: ".safetensors,.json,.zip" });
  const problem = h("p.notice.bad", { role: "alert", hidden: true });
  const button = h("button.primary", { type: "submit" }, "Register");
  file.addEventListener("change", () => {
    if (!name.value && file.files.length) name.value = file.files[0].name.replace(/\.(safetensors|zip|json)$/, "");
  });
  const form = h("form.card", {},
    h("h2", {}, "Bring one along"),
    h("p.hint", {}, "A soft prompt's .safetensors, or an adapter that PEFT has trained: its two files, or a zip of its folder."),
    h(".fields", {},
      h("div", {}, h("label", { htmlFor: "upload-file" }, "File"), file),
      h("div", {}, h("label", { htmlFor: "upload-name" }, "Name"), name),
      button),
    problem);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    problem.hidden = true;
    button.disabled = true;
    const body = new FormData();
    body.append("name", name.value.trim());
    for (const one of file.files) body.append("file", one);
    try {
      await send("v1/soft_prompts", { method: "POST", body });
      announce(`${name.value} is registered`);
      form.reset();
      await done();
    } catch (error) {
      refuse(problem, error);
    } finally {
      button.disabled = false;
    }
  });
  return form;
}
