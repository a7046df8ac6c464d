// Elements out of plain values. Text is only ever set as text: nothing a client or a model has written becomes markup.

const SVG = "http://www.w3.org/2000/svg";

/** `h("p.note", {id: "x", onclick: f}, "text", child)`: an element; null and false children are left out. */
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  set(element, properties);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function set(element, properties) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, part] of Object.entries(value)) element.style.setProperty(name, part);
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key in element && key !== "list" && key !== "form") element[key] = value;
    else element.setAttribute(key, value);
  }
}

/** Write only what has changed: the rest of the page keeps its selection and its focus. */
export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

export function icon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

/** Elements by key, made, updated, moved and removed so that a row which stays is the same element. */
export function keyed(parent, items, key, make, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let element = old.get(name);
    if (element) old.delete(name);
    else {
      element = make(item);
      element.dataset.key = name;
    }
    update(element, item);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  for (const gone of old.values()) gone.remove();
}

/** For people who do not see the page: said once, politely. */
export function announce(message) {
  let place = document.getElementById("announcer");
  if (!place) {
    place = h("p.unseen", { id: "announcer", role: "status" });
    document.body.append(place);
  }
  text(place, message);
}

/** A question before something that cannot be undone. Resolves to whether the answer is yes. */
export function confirmed(title, body, action) {
  return new Promise((resolve) => {
    const dialog = h("dialog.ask", { "aria-labelledby": "confirm-title" });
    const close = (answer) => () => {
      dialog.close();
      dialog.remove();
      resolve(answer);
    };
    dialog.append(
      h("h2", { id: "confirm-title" }, title),
      h("p", {}, body),
      h(".row.end", {},
        h("button.quiet", { type: "button", onclick: close(false) }, "Keep it"),
        h("button.danger", { type: "button", onclick: close(true) }, action)),
    );
    dialog.addEventListener("cancel", close(false));
    document.body.append(dialog);
    dialog.showModal();
  });
}
