// Figures as people read them.

const grouped = new Intl.NumberFormat("en");

export const count = (value) => grouped.format(value);

export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${(value / 3600).toFixed(1)} h`;
}

export function bytes(value) {
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)} GB`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} MB`;
  return `${Math.max(1, Math.round(value / 1e3))} kB`;
}

export function decimal(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

export function ratio(value) {
  return value >= 10 ? `${Math.round(value)}×` : `${value.toFixed(1)}×`;
}

export const percent = (value) => `${Math.round(value * 100)} %`;

export function rate(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  return value >= 100 ? count(Math.round(value)) : value.toFixed(1);
}

export const date = (unix) =>
  new Date(unix * 1000).toLocaleString("en", { dateStyle: "medium", timeStyle: "short", hour12: false });

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
