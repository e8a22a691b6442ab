// Elements of the page, and how numbers are written.

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
let made = 0;
const fresh = (word) => `${word}-${++made}`;

function num(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  const text = Number.isInteger(value) ? String(value) : size >= 1000 ? value.toFixed(0)
    : size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return text.replace(/-/g, "−");
}

// How the numbers of one map are written: a shared power of ten, and as many decimals as the largest needs.
function writing(largest) {
  const power = largest > 0 && largest < 1e-2 ? Math.floor(Math.log10(largest)) : 0;
  const scaled = largest / 10 ** power || 1;
  const decimals = Math.min(4, Math.max(0, 1 - Math.floor(Math.log10(scaled / 3))));
  return {
    power,
    text: (value) => value === null ? "–" : (value / 10 ** power).toFixed(decimals).replace(/^-(0(\.0*)?)$/, "$1").replace("-", "−"),
  };
}
const superscript = (n) => [...String(n)].map((c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("");

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}
