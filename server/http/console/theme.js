// Loaded before the first paint, so that a chosen theme does not flash up late. Without a choice the system's applies.
const chosen = localStorage.getItem("softbatch-theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
