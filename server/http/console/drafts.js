// What somebody has typed stays while they look at another tab; nothing of it is stored.

export const drafts = { context: "", question: "", name: "" };

/** A field that keeps its draft. */
export function kept(field, name) {
  field.value = drafts[name];
  field.addEventListener("input", () => (drafts[name] = field.value));
  return field;
}

/** A text area that also takes a text file dropped on it. */
export function takesFiles(area, loaded = () => {}) {
  const take = async (file) => {
    area.value = await file.text();
    area.dispatchEvent(new Event("input"));
    loaded(file);
  };
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    area.classList.remove("over");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  return take;
}
