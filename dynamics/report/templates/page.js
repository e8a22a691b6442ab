"use strict";
(() => {
const page = JSON.parse(document.getElementById("data").textContent);
const PALETTE = ["#009E73", "#CC79A7", "#0072B2", "#D55E00", "#56B4E9", "#E69F00"];
const DASHES = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"};
const SHOWN = 2000;       // rows of numbers below a picture
const redraws = [];       // what follows the slider, the theme and the width
let now = page.steps[page.steps.length - 1] ?? null;

// --- elements ---------------------------------------------------------------------------------------------

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

// --- numbers ----------------------------------------------------------------------------------------------

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

// --- a Dataset --------------------------------------------------------------------------------------------

function at(data, name, where) {
  const variable = data.variables[name];
  let place = 0;
  for (const dim of variable.dims) place = place * data.dims[dim].length + where[dim];
  return variable.values[place];
}
const has = (data, name, dim) => data.variables[name] !== undefined && data.variables[name].dims.includes(dim);
function units(data, name, where) {
  const own = data.variables[name].units, by = data.coords.units;
  const found = own || (by && by.dim === "measure" && data.variables[name].dims.includes("measure") ? by.values[where.measure] : "");
  return found === "1" ? "" : found;
}
const withUnits = (words, unit) => unit ? `${words} (${unit})` : words;

// The last of a Dataset's steps at or before the slider's checkpoint, else its first.
function stepPlace(data) {
  const steps = data.dims.step;
  if (!steps) return 0;
  let place = 0;
  steps.forEach((step, i) => { if (now !== null && step <= now) place = i; });
  return place;
}

// Every value beside its labels, as `results.tidy` has it: headings, and a row for each combination of labels.
function tidy(data) {
  const dims = Object.keys(data.dims), coords = Object.keys(data.coords), names = Object.keys(data.variables);
  const rows = [[...dims, ...coords, ...names]], where = {};
  const walk = (depth) => {
    if (depth < dims.length) {
      data.dims[dims[depth]].forEach((_, i) => { where[dims[depth]] = i; walk(depth + 1); });
      return;
    }
    rows.push([...dims.map((dim) => data.dims[dim][where[dim]]), ...coords.map((c) => data.coords[c].values[where[data.coords[c].dim]]),
      ...names.map((name) => at(data, name, where))]);
  };
  walk(0);
  return rows;
}
function csv(data) {
  const quoted = (value) => value === null ? "" : /[",\n]/.test(value) ? `"${String(value).replace(/"/g, '""')}"` : String(value);
  return tidy(data).map((row) => row.map(quoted).join(",")).join("\n") + "\n";
}

function save(name, text) {
  const url = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  h("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// --- colours ----------------------------------------------------------------------------------------------

const channels = (text) => (text.match(/[\d.]+/g) || [255, 255, 255]).slice(0, 3).map(Number);
function paper() { return channels(getComputedStyle(document.body).backgroundColor); }
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
// From the page's own colour to red where positive, to blue where negative; the text is what contrasts more.
function shade(t, ground) {
  const end = t < 0 ? [33, 102, 172] : [190, 60, 35];
  const part = Math.min(1, Math.abs(t)) ** 0.8;
  const rgb = ground.map((c, i) => Math.round(c + (end[i] - c) * part));
  const light = luminance(rgb);
  return `background:rgb(${rgb});color:${(light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000" : "#fff"}`;
}
// Values -> [−1, 1]: diverging from 0, or between the two ends where all lie on one side and far from 0.
function scale(values) {
  const known = values.filter((v) => v !== null);
  const low = Math.min(...known), high = Math.max(...known), most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  if (low > 0.3 * high) return {of: (v) => high > low ? (v - low) / (high - low) : 0.5, low, high, from: low, most};
  return {of: (v) => v / most, low, high, from: 0, most};
}

// --- the tooltip ------------------------------------------------------------------------------------------

const tip = document.getElementById("tip");
function showTip(element, words) {
  tip.textContent = words;
  tip.hidden = false;
  const box = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.max(4, Math.min(box.left + box.width / 2 - own.width / 2, innerWidth - own.width - 4));
  const above = box.top - own.height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < 50 ? box.bottom + 6 : above}px`;
}
const hideTip = () => { tip.hidden = true; };
const tipped = (words) => ({
  onpointerenter: (event) => showTip(event.currentTarget, words()), onpointerleave: hideTip,
  onfocus: (event) => { if (event.currentTarget.matches(":focus-visible")) showTip(event.currentTarget, words()); }, onblur: hideTip,
});

// --- what is chosen ---------------------------------------------------------------------------------------

function select(words, labels, chosen, change) {
  const id = fresh("select");
  return h("label", {for: id}, words, h("select", {id, onchange: (event) => change(Number(event.target.value))},
    labels.map((label, i) => h("option", {value: i, selected: i === chosen}, String(label)))));
}

// A view of a figure: the place in every dim, the level of sites and the variable that are looked at.
function viewOf(figure, drawn) {
  const data = figure.data;
  const first = Object.fromEntries(Object.keys(data.dims).map((dim) => {
    const wanted = data.dims[dim].indexOf((figure.chosen || {})[dim]);
    return [dim, Math.max(0, wanted)];
  }));
  const variables = figure.variables || Object.keys(data.variables).filter((name) => drawn.every((dim) => has(data, name, dim)));
  const levels = figure.kind !== "lines" && data.coords.level && data.coords.level.dim === "site" ? [...new Set(data.coords.level.values)] : [];
  const level = Math.max(0, levels.indexOf((figure.chosen || {}).level));
  return {figure, data, place: first, variables, variable: variables[0], levels, level: levels[level]};
}

function controls(view, drawn, redraw) {
  const found = [];
  if (view.variables.length > 1) {
    found.push(select("show", view.variables, view.variables.indexOf(view.variable), (i) => { view.variable = view.variables[i]; redraw(); }));
  }
  if (view.levels.length > 1) {
    found.push(select("sites", view.levels, view.levels.indexOf(view.level), (i) => { view.level = view.levels[i]; view.site = undefined; redraw(); }));
  }
  for (const dim of dimsOf(view)) {
    if (drawn.includes(dim) || view.data.dims[dim].length < 2) continue;
    found.push(select(dim.replace("_", " "), view.data.dims[dim], view.place[dim], (i) => { view.place[dim] = i; redraw(); }));
  }
  return found;
}
const dimsOf = (view) => [...new Set(view.variables.flatMap((name) => view.data.variables[name].dims))];
const sitesOf = (view) => view.data.dims.site.map((_, i) => i).filter((i) => !view.levels.length || view.data.coords.level.values[i] === view.level);

// The command and the lines of Python for what is chosen.
function filled(text, view, kept, draw) {
  const dims = dimsOf(view).filter((dim) => !kept.includes(dim));
  const label = (dim) => view.data.dims[dim][view.place[dim]];
  const words = {
    sel: dims.map((dim) => `${dim}=${JSON.stringify(label(dim))}`).join(", "),
    at: [...dims.map((dim) => `${dim}=${label(dim)}`), ...(view.level ? [`level=${view.level}`] : [])].map((word) => / /.test(word) ? `"${word}"` : word).join(" "),
    level: view.level ?? "", variable: view.variable ?? "", draw: draw ?? "",
  };
  words.at = words.at && `--at ${words.at}`;
  return text.replace(/\{(sel|at|level|variable|draw)\}/g, (_, name) => words[name]).trim();
}

// --- charts -----------------------------------------------------------------------------------------------

const style = (figure, label, i) => {
  const known = (figure.styles || {})[label];
  if (!known) return {label: String(label), colour: PALETTE[i % PALETTE.length], dash: ["", "7 4", "2 3"][Math.floor(i / PALETTE.length) % 3]};
  return {label: known.label, colour: known.colour, dash: DASHES[known.dash] ?? ""};
};
const stroke = (one) => one.colour === "#000000" ? {class: "ink"} : {stroke: one.colour};

function legend(series) {
  return h("ul", {class: "legend"}, series.map((one) => h("li", {},
    one.area ? s("svg", {width: 14, height: 12, "aria-hidden": "true"}, s("rect", {width: 14, height: 12, fill: one.colour}))
      : s("svg", {width: 26, height: 8, "aria-hidden": "true"}, s("line", {x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 2.5, "stroke-dasharray": one.dash, ...stroke(one)})),
    one.label)));
}

function frame(box, {x, low, high, ylabel, xlabel = "training step", phases = {}, height = 300, margin = 0, words, title}) {
  const width = Math.max(240, box.clientWidth || 640);
  const named = Object.entries(phases).filter(([, step]) => step >= x[0] && step <= x[1]);
  const left = 62, right = 14 + margin;
  const across = (v) => left + (v - x[0]) / (x[1] - x[0] || 1) * (width - left - right);
  const ends = [];
  const marks = named.map(([name, step]) => {
    const start = across(step);
    let row = ends.findIndex((end) => start > end + 6);
    if (row < 0) row = ends.length;
    ends[row] = start + 7 * name.length;
    return {name, start, row};
  });
  const top = 10 + 15 * ends.length, bottom = 42;
  const up = (v) => height - bottom - (v - low) / (high - low || 1) * (height - top - bottom);
  const ids = [fresh("title"), fresh("desc")];
  const svg = s("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": ids.join(" ")},
    s("title", {id: ids[0]}, title), s("desc", {id: ids[1]}, words));
  for (const value of ticks(low, high, Math.max(3, Math.floor((height - top - bottom) / 40)))) {
    svg.append(s("line", {class: "rule", x1: left, x2: width - right, y1: up(value), y2: up(value)}),
      s("text", {class: "faint", x: left - 6, y: up(value) + 4, "text-anchor": "end"}, num(value)));
  }
  for (const value of ticks(x[0], x[1], Math.max(2, Math.floor((width - left - right) / 80)))) {
    svg.append(s("text", {class: "faint", x: across(value), y: height - bottom + 18, "text-anchor": "middle"}, num(value)));
  }
  marks.forEach(({name, start, row}) => svg.append(
    s("line", {class: "rule", x1: start, x2: start, y1: top - 4, y2: height - bottom, "stroke-width": 1.5}),
    s("text", {x: Math.min(start + 3, width - 7 * name.length), y: 12 + 15 * row}, name)));
  svg.append(s("line", {class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}),
    s("text", {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle"}, xlabel),
    s("text", {x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`}, shortened(ylabel, height - top - bottom)));
  return {svg, across, up, width, height, left, right, top, bottom};
}
const shortened = (words, room) => words.length * 6.6 <= room + 40 ? words : `${words.slice(0, Math.floor((room + 40) / 6.6) - 1)}…`;

// Lines over training. A series has `x`, `y`, and perhaps `low` and `high`, as long as x.
function lines(box, {series, ylabel, unit, phases, guesses = {}, checkpoints = [], title, height, quiet}) {
  const drawn = series.map((one) => ({...one, points: one.x.map((x, i) => [x, one.y[i], one.low ? one.low[i] : null, one.high ? one.high[i] : null]).filter((p) => p[1] !== null)}));
  const all = drawn.flatMap((one) => one.points);
  if (!all.length) { box.append(h("p", {class: "faint"}, "There is no number to draw here.")); return; }
  const values = all.flatMap((p) => p.slice(1)).filter((v) => v !== null).concat(Object.values(guesses));
  let low = Math.min(...values, 0), high = Math.max(...values, 0);
  if (unit === "share") [low, high] = [0, 1];
  else { const room = 0.05 * (high - low || 1); low -= low < 0 ? room : 0; high += high > 0 ? room : 0; }
  const xs = all.map((p) => p[0]).concat(checkpoints);
  const words = drawn.filter((one) => one.points.length).map((one) => {
    const [first, last] = [one.points[0], one.points[one.points.length - 1]];
    const ys = one.points.map((p) => p[1]);
    return `${one.label}: ${num(first[1])} at step ${first[0]}, ${num(last[1])} at step ${last[0]}, between ${num(Math.min(...ys))} and ${num(Math.max(...ys))}.`;
  }).join(" ");
  const margin = Object.keys(guesses).length && !quiet && box.clientWidth > 600 ? 100 : 0;
  const f = frame(box, {x: [Math.min(...xs), Math.max(...xs)], low, high, ylabel, phases, height, margin, words, title});
  const rows = Object.entries(guesses).sort((a, b) => a[1] - b[1]);
  for (const [, value] of rows) f.svg.append(
    s("line", {x1: f.left, x2: f.width - f.right, y1: f.up(value), y2: f.up(value), class: "axis", "stroke-dasharray": "2 3"}));
  for (const step of checkpoints) {
    const x = f.across(step), y = f.height - f.bottom;
    f.svg.append(s("path", {class: "tick", d: `M${x - 3.5} ${y + 7}L${x + 3.5} ${y + 7}L${x} ${y + 1}Z`}));
  }
  for (const one of drawn) {
    const band = one.points.filter((p) => p[2] !== null && p[3] !== null);
    if (band.length > 1) {
      const edge = [...band.map((p) => [p[0], p[3]]), ...band.map((p) => [p[0], p[2]]).reverse()];
      f.svg.append(s("path", {d: `M${edge.map(([x, y]) => `${f.across(x).toFixed(1)} ${f.up(y).toFixed(1)}`).join("L")}Z`, fill: one.colour, opacity: 0.18}));
    }
    f.svg.append(s("path", {d: `M${one.points.map((p) => `${f.across(p[0]).toFixed(1)} ${f.up(p[1]).toFixed(1)}`).join("L")}`, fill: "none", "stroke-width": 2, "stroke-dasharray": one.dash, "stroke-linejoin": "round", ...stroke(one)}));
    if (one.points.length < 12) one.points.forEach((p) => {
      const x = f.across(p[0]);
      f.svg.append(s("circle", {cx: x, cy: f.up(p[1]), r: 3, fill: one.colour === "#000000" ? "currentColor" : one.colour}));
      if (band.length && p[2] !== null) f.svg.append(s("line", {x1: x, x2: x, y1: f.up(p[2]), y2: f.up(p[3]), "stroke-width": 1.5, ...stroke(one)}));
    });
  }
  if (!quiet) rows.forEach(([label, value], i) => f.svg.append(
    s("text", {class: "faint halo", x: margin ? f.width - f.right + 6 : f.left + 6 + (i % 2) * 110, y: f.up(value) + (margin ? 4 : -4)}, label)));
  if (now !== null && now >= Math.min(...xs) && now <= Math.max(...xs)) {
    f.svg.append(s("line", {class: "now", x1: f.across(now), x2: f.across(now), y1: f.top - 4, y2: f.height - f.bottom}));
  }
  box.append(f.svg);
  if (quiet) return;
  const readout = h("p", {class: "readout", "aria-hidden": "true"});
  const steps = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  f.svg.addEventListener("pointermove", (event) => {
    const seen = (event.clientX - f.svg.getBoundingClientRect().left) * f.width / f.svg.getBoundingClientRect().width;
    const near = steps.reduce((best, step) => Math.abs(f.across(step) - seen) < Math.abs(f.across(best) - seen) ? step : best, steps[0]);
    readout.textContent = `step ${near}: ` + drawn.map((one) => { const p = one.points.find((q) => q[0] === near); return p ? `${one.label} ${num(p[1])}` : null; }).filter(Boolean).join(", ");
  });
  f.svg.addEventListener("pointerleave", () => { readout.textContent = ""; });
  box.append(readout);
}

// --- kinds of figures: each gives {drawn, draw}: dims that need no choice, and (view, box) -> what was drawn --

function seriesOf(view, extra = {}) {
  const {figure, data} = view, by = figure.series, labels = by && has(data, view.variable, by) ? data.dims[by] : [view.variable];
  const unknown = labels.filter((label) => !(figure.styles || {})[label]).sort();   // one colour in every picture
  return labels.map((label, i) => ({
    ...style(figure, label, unknown.indexOf(label)), x: data.dims.step,
    y: data.dims.step.map((_, step) => at(data, view.variable, {...view.place, ...extra, step, ...(by ? {[by]: i} : {})})),
  })).filter((one) => one.y.some((y) => y !== null));
}

const drawLines = (view, box) => {
  const {figure, data} = view, series = seriesOf(view), unit = units(data, view.variable, view.place);
  box.append(legend(series));
  lines(box, {series, title: figure.title, unit, phases: figure.phases, checkpoints: figure.checkpoints,
    guesses: view.variable === "accuracy" ? figure.guesses : {}, ylabel: withUnits(view.variable.replace(/_/g, " "), unit === "share" ? "" : unit), height: 320});
};

const drawMultiples = (view, box) => {
  const {figure, data} = view, unit = units(data, view.variable, view.place);
  box.append(legend(seriesOf(view, {[figure.panels]: 0})));
  const grid = h("div", {class: "panels"});
  box.append(grid);
  data.dims[figure.panels].forEach((label, i) => {
    const panel = h("div", {}, h("h4", {}, String(label)));
    grid.append(panel);
    lines(panel, {series: seriesOf(view, {[figure.panels]: i}), title: `${figure.title}: ${label}`, unit, phases: figure.phases,
      guesses: view.variable === "accuracy" ? figure.guesses : {}, ylabel: view.variable.replace(/_/g, " "), height: 200, quiet: true});
  });
};

// One table of buttons: rows and columns have labels, `cell` says what stands where.
function mapTable({caption, corner, rows, columns, cell, nowColumn, colours, write, pressed, choose}) {
  const ground = paper();
  let first = true;
  const table = h("table", {class: "map", onkeydown: arrows}, h("caption", {}, caption),
    h("thead", {}, h("tr", {}, h("th", {scope: "col"}, corner), columns.map((label, j) => h("th", {scope: "col", class: j === nowColumn ? "now" : null, "aria-current": j === nowColumn ? "step" : null}, String(label))))),
    h("tbody", {}, rows.map((label, i) => h("tr", {}, h("th", {scope: "row"}, String(label)), columns.map((_, j) => {
      const found = cell(i, j);
      if (!found) return h("td", {});
      const button = h("button", {type: "button", class: `cell${found.sure ? " sure" : ""}`, tabindex: first ? 0 : -1, "data-site": found.name,
        "aria-label": found.words.replace(/\n/g, ", "), "aria-pressed": pressed ? String(pressed(i, j)) : null,
        style: found.value === null ? "" : shade(colours.of(found.value), ground), onclick: (event) => choose(i, j, event.currentTarget), ...tipped(() => found.words)}, write.text(found.value));
      first = false;
      return h("td", {class: j === nowColumn ? "now" : null}, button);
    })))));
  return h("div", {class: "scroll tall", tabindex: 0, role: "region", "aria-label": caption}, table);
}

// The arrow keys go from cell to cell, one of which the tabulator reaches.
function arrows(event) {
  const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
  const cell = event.target.closest && event.target.closest("td");
  if (!step || !cell) return;
  event.preventDefault();
  const row = event.currentTarget.rows[cell.parentElement.rowIndex + step[0]];
  const next = row && row.cells[cell.cellIndex + step[1]] && row.cells[cell.cellIndex + step[1]].querySelector(".cell");
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function scaleLegend(colours, write, unit) {
  const ground = paper(), power = write.power ? ` × 10${superscript(write.power)}` : "";
  const ends = colours.from || colours.low >= 0 ? [colours.from, colours.high] : colours.high <= 0 ? [colours.low, 0] : [-colours.most, 0, colours.most];
  return h("ul", {class: "legend"}, ends.map((value) => h("li", {}, h("span", {class: "cell", style: shade(colours.of(value), ground)}, write.text(value)))),
    h("li", {}, `${power}${unit ? ` ${unit}` : ""}`.trim() || "no units"));
}

// All that is known of one number of a map, a line each.
function wordsOf(view, name, where) {
  const {data, variable} = view, unit = units(data, variable, where), get = (n) => data.variables[n] ? at(data, n, where) : null;
  const found = [name, `${variable} ${num(get(variable))}${unit ? ` ${unit}` : ""}`];
  if (get(`${variable}_low`) !== null) found.push(`interval ${num(get(`${variable}_low`))} to ${num(get(`${variable}_high`))}`);
  const more = ["n", "p", "q"].filter((n) => get(n) !== null).map((n) => `${n} ${num(get(n))}`);
  if (more.length) found.push(more.join(", "));
  if (get("placebo") !== null) found.push(`placebo ${num(get("placebo"))}`);
  if (variable !== "recovery" && get("recovery") !== null) found.push(`recovery ${num(get("recovery"))}`);
  return found.join("\n");
}

const coordOf = (data, name, i) => data.coords[name] && data.coords[name].dim === "site" ? data.coords[name].values[i] : null;

// Sites by component and layer, and by head, where every site of the level is one head's; else nothing.
function headsOf(view, sites) {
  const cells = new Map(), rows = [], columns = [];
  for (const i of sites) {
    const [layer, head, component] = ["layer", "head", "component"].map((name) => coordOf(view.data, name, i));
    if (head === null || head < 0 || layer < 0) return null;
    const row = `${component === "head" ? "" : `${component}, `}layer ${layer}`;
    if (!rows.includes(row)) rows.push(row);
    if (!columns.includes(head)) columns.push(head);
    if (cells.has(`${row}|${head}`)) return null;
    cells.set(`${row}|${head}`, i);
  }
  columns.sort((a, b) => a - b);
  return {rows, columns, site: (i, j) => cells.get(`${rows[i]}|${columns[j]}`)};
}

const drawMap = (view, box) => {
  const {figure, data, variable} = view, sites = sitesOf(view), names = data.dims.site;
  const stepped = has(data, variable, "step"), step = stepPlace(data), unit = units(data, variable, view.place);
  const everywhere = sites.flatMap((site) => stepped ? data.dims.step.map((_, k) => at(data, variable, {...view.place, site, step: k})) : [at(data, variable, {...view.place, site})]);
  if (everywhere.every((v) => v === null)) { box.append(h("p", {class: "faint"}, "Nothing is known here: the gap is not distinguishable from zero.")); return; }
  const colours = scale(everywhere), write = writing(colours.most), heads = figure.layouts.includes("grid") ? headsOf(view, sites) : null;
  const detail = h("div", {class: "detail", role: "region", tabindex: -1, hidden: true});
  const open = (site, button) => { view.site = site; drawDetail(view, detail, () => { view.site = undefined; if (button) button.focus(); }); detail.focus(); };
  const cellAt = (site, k) => {
    const where = {...view.place, site, step: k}, q = data.variables.q ? at(data, "q", where) : null;
    return {name: names[site], value: at(data, variable, where), sure: q !== null && q < 0.05, words: wordsOf(view, stepped ? `${names[site]}, step ${data.dims.step[k]}` : names[site], where)};
  };
  const what = withUnits(data.variables[variable].words || variable, unit);
  const pictures = h("div", {class: heads && stepped && data.dims.step.length > 1 ? "pictures two" : "pictures"});
  if (heads) pictures.append(mapTable({caption: `${what}, layer by head${stepped ? `, step ${data.dims.step[step]}` : ""}`, corner: "", rows: heads.rows, columns: heads.columns.map((head) => `head ${head}`),
    cell: (i, j) => heads.site(i, j) === undefined ? null : cellAt(heads.site(i, j), step), colours, write, choose: (i, j, button) => open(heads.site(i, j), button)}));
  if (!heads || (stepped && data.dims.step.length > 1)) pictures.append(mapTable({caption: `${what}, site by ${stepped ? "training step" : "value"}`, corner: "site", rows: sites.map((i) => names[i]),
    columns: stepped ? data.dims.step : [variable], cell: (i, j) => cellAt(sites[i], stepped ? j : 0), nowColumn: stepped ? step : undefined, colours, write, choose: (i, j, button) => open(sites[i], button)}));
  box.append(scaleLegend(colours, write, unit), pictures, detail);
  if (stepped) box.append(h("p", {class: "faint"}, `The slider is at step ${now}; the last step at or before it that was looked at here is ${data.dims.step[step]}.`));
  if (view.site !== undefined) drawDetail(view, detail, () => { view.site = undefined; });
  return {kept: heads && heads.rows.every((row) => /^layer/.test(row)) ? [] : ["step"], step,
    draw: heads && heads.rows.every((row) => /^layer/.test(row)) ? "heatmap" : stepped && data.dims.step.length > 1 ? "site_by_step" : "recoveries"};
};

// One site: its curve over training, and the ten checks where they were made.
function drawDetail(view, box, closed) {
  const {data, variable, site} = view, name = data.dims.site[site], by = has(data, variable, "optimizer") ? "optimizer" : null;
  box.replaceChildren(h("button", {type: "button", class: "close", onclick: () => { box.hidden = true; closed(); }}, "Close"), h("h4", {}, name));
  box.hidden = false;
  box.setAttribute("aria-label", `${name} in detail`);
  const where = (i, step) => ({...view.place, site, step, ...(by ? {[by]: i} : {})});
  if (has(data, variable, "step") && data.dims.step.length > 1) {
    const row = (name, i) => data.variables[name] ? data.dims.step.map((_, k) => at(data, name, where(i, k))) : null;
    const series = (by ? data.dims[by] : [variable]).map((label, i) => ({...style({}, by ? `${label} optimizer` : label, i + 2), x: data.dims.step, y: row(variable, i), low: row(`${variable}_low`, i), high: row(`${variable}_high`, i)}));
    const unit = units(data, variable, view.place), plot = h("div", {});
    box.append(legend(series), plot);
    lines(plot, {series, title: `${name} over training`, unit, phases: page.phases && Object.fromEntries(Object.entries(page.phases).filter(([n]) => n !== "end")), ylabel: withUnits(variable, unit), height: 230});
  } else box.append(h("p", {}, wordsOf(view, "", where(view.place.optimizer ?? 0, 0)).trim().replace(/\n/g, "; ")));
  const asked = page.checks.filter((one) => one.site === name);
  asked.forEach((one) => box.append(h("p", {class: "faint"}, `Ten checks, ${one.at}`), h("ul", {class: "checks"}, one.checks.map((c) => h("li", {}, h("b", {class: c.verdict}, c.verdict), ` ${c.name}: ${c.figure}`)))));
  if (!asked.length) box.append(h("p", {class: "faint"}, `The ten checks were not kept for this site: dynamics believe RUN --site "${name}" --out RUN/results/checks-NAME.h5`));
}

const drawScatter = (view, box) => {
  const {figure, data} = view, sites = sitesOf(view), step = stepPlace(data), where = (site) => ({...view.place, site, step});
  const points = sites.map((i) => ({name: data.dims.site[i], x: at(data, "exact", where(i)), y: at(data, "attributed", where(i))})).filter((p) => p.x !== null && p.y !== null);
  if (!points.length) { box.append(h("p", {class: "faint"}, "There is no number to draw here.")); return; }
  const values = points.flatMap((p) => [p.x, p.y]), low = Math.min(0, ...values), high = Math.max(0, ...values), room = 0.08 * (high - low || 1), ends = [low - room, high + room];
  const unit = units(data, "exact", view.place), plot = h("div", {style: "max-width:560px"});
  box.append(plot);
  const f = frame(plot, {x: ends, low: ends[0], high: ends[1], xlabel: withUnits("exact", unit), ylabel: withUnits("attributed", unit), height: Math.min(420, Math.max(280, plot.clientWidth * 0.8)), title: figure.title,
    words: points.map((p) => `${p.name}: exact ${num(p.x)}, attributed ${num(p.y)}.`).join(" ")});
  f.svg.append(s("line", {class: "axis", "stroke-dasharray": "4 4", x1: f.across(ends[0]), y1: f.up(ends[0]), x2: f.across(ends[1]), y2: f.up(ends[1])}));
  const named = [...points].sort((a, b) => Math.abs(b.x) + Math.abs(b.y) - Math.abs(a.x) - Math.abs(a.y)).slice(0, 5);
  const taken = [];
  points.forEach((p) => f.svg.append(s("circle", {cx: f.across(p.x), cy: f.up(p.y), r: 5, fill: "#0072B2", "fill-opacity": 0.75, stroke: "currentColor", "stroke-width": 0.6, ...tipped(() => `${p.name}\nexact ${num(p.x)}\nattributed ${num(p.y)}`)})));
  named.forEach((p) => {
    let y = f.up(p.y) + 4;
    while (taken.some((t) => Math.abs(t - y) < 13)) y += 13;
    taken.push(y);
    const right = f.across(p.x) > f.width * 0.6;
    f.svg.append(s("text", {x: f.across(p.x) + (right ? -9 : 9), y, "text-anchor": right ? "end" : "start"}, p.name));
  });
  plot.append(f.svg);
  const rank = figure.rank && figure.rank.dims.level.includes(view.level) ? at(figure.rank, "spearman", {...view.place, step, level: figure.rank.dims.level.indexOf(view.level)}) : null;
  const words = [data.dims.step ? `Step ${data.dims.step[step]}` : "", rank === null ? "" : `Spearman's ρ over these ${points.length} sites ${num(rank)}`].filter(Boolean).join(". ");
  if (words) box.append(h("p", {class: "faint"}, `${words}.`));
};

const drawTransfer = (view, box) => {
  const {data, variable} = view, sites = sitesOf(view), steps = data.dims.step, sources = data.dims.source_step;
  if (!sites.includes(view.place.site)) view.place.site = sites[0];
  const names = data.dims.site, unit = units(data, variable, view.place);
  const everywhere = sites.flatMap((site) => steps.flatMap((_, step) => sources.map((__, source_step) => at(data, variable, {...view.place, site, step, source_step}))));
  const colours = scale(everywhere), write = writing(colours.most), what = withUnits(data.variables[variable].words || variable, unit);
  const cellAt = (site, step, source_step) => {
    const where = {...view.place, site, step, source_step}, q = data.variables.q ? at(data, "q", where) : null;
    return {name: names[site], value: at(data, variable, where), sure: q !== null && q < 0.05, words: wordsOf(view, `${names[site]} of step ${sources[source_step]} in step ${steps[step]}`, where)};
  };
  const slider = (words, labels, dim) => {
    const id = fresh("pair"), out = h("output", {for: id}, `step ${labels[view.place[dim]]}`);
    return [h("label", {for: id}, words), h("input", {id, type: "range", min: 0, max: labels.length - 1, value: view.place[dim], "aria-valuetext": `step ${labels[view.place[dim]]}`,
      oninput: (event) => { view.place[dim] = Number(event.target.value); view.redraw(id); }, "data-keep": dim}), out];
  };
  box.append(h("div", {class: "pair"}, slider("from", sources, "source_step"), slider("into", steps, "step")), scaleLegend(colours, write, unit));
  const heads = headsOf(view, sites), right = {caption: `${what}: step ${sources[view.place.source_step]} put into step ${steps[view.place.step]}`, colours, write};
  const choose = (site) => { view.place.site = site; view.redraw(); };
  box.append(h("div", {class: "pictures two"},
    mapTable({caption: `${names[view.place.site]}: ${what}`, corner: "from \\ into", rows: sources, columns: steps, colours, write, cell: (i, j) => cellAt(view.place.site, j, i),
      pressed: (i, j) => i === view.place.source_step && j === view.place.step, choose: (i, j) => { view.place.source_step = i; view.place.step = j; view.redraw(); }}),
    heads ? mapTable({...right, corner: "", rows: heads.rows, columns: heads.columns.map((head) => `head ${head}`), cell: (i, j) => heads.site(i, j) === undefined ? null : cellAt(heads.site(i, j), view.place.step, view.place.source_step),
      pressed: (i, j) => heads.site(i, j) === view.place.site, choose: (i, j) => choose(heads.site(i, j))})
      : mapTable({...right, corner: "site", rows: sites.map((i) => names[i]), columns: [variable], cell: (i) => cellAt(sites[i], view.place.step, view.place.source_step), pressed: (i) => sites[i] === view.place.site, choose: (i) => choose(sites[i])})));
  return {kept: ["step", "source_step", "site"]};
};

const drawStack = (view, box) => {
  const {figure, data} = view, parts = figure.parts, steps = data.dims.step;
  const told = (parts === "site" ? sitesOf(view) : data.dims[parts].map((_, i) => i)).map((i) => ({label: String(data.dims[parts][i]), values: steps.map((_, step) => at(data, "written", {...view.place, [parts]: i, step}) ?? 0)}));
  told.sort((a, b) => Math.max(...b.values.map(Math.abs)) - Math.max(...a.values.map(Math.abs)));
  const shown = told.slice(0, 7).map((one, i) => ({...one, colour: ["#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442"][i]}));
  const rest = told.slice(7);
  if (rest.length) shown.push({label: rest.length > 1 ? `all ${rest.length} others` : rest[0].label, colour: "#888888", values: steps.map((_, k) => rest.reduce((sum, one) => sum + one.values[k], 0))});
  const change = steps.map((_, step) => at(data, "change", {...view.place, step}));
  const above = steps.map(() => 0), below = steps.map(() => 0);
  const areas = shown.map((one) => {
    const up = above.slice(), down = below.slice();
    one.values.forEach((v, k) => { if (v > 0) above[k] += v; else below[k] += v; });
    return {...one, up: [up, above.slice()], down: [down, below.slice()]};
  });
  const low = Math.min(...below, ...change), high = Math.max(...above, ...change), unit = units(data, "written", view.place);
  box.append(legend([...areas.map((one) => ({...one, area: true})), {label: "the measure's change", colour: "#000000", dash: ""}]));
  const words = `The measure changed by ${num(change[change.length - 1])}. ` + shown.map((one) => `${one.label} wrote ${num(one.values[one.values.length - 1])}.`).join(" ");
  const f = frame(box, {x: [steps[0], steps[steps.length - 1]], low, high, ylabel: withUnits("change of the measure", unit), phases: figure.phases, height: 340, title: figure.title, words});
  const path = ([one, two]) => `M${[...steps.map((x, k) => [x, two[k]]), ...steps.map((x, k) => [x, one[k]]).reverse()].map(([x, y]) => `${f.across(x).toFixed(1)} ${f.up(y).toFixed(1)}`).join("L")}Z`;
  areas.forEach((one) => f.svg.append(s("path", {d: path(one.up), fill: one.colour, "fill-opacity": 0.85, ...tipped(() => `${one.label}\n${num(one.values[one.values.length - 1])} ${unit} in all`)}), s("path", {d: path(one.down), fill: one.colour, "fill-opacity": 0.85, ...tipped(() => `${one.label}\n${num(one.values[one.values.length - 1])} ${unit} in all`)})));
  f.svg.append(s("line", {class: "axis", x1: f.left, x2: f.width - f.right, y1: f.up(0), y2: f.up(0)}),
    s("path", {class: "ink", fill: "none", "stroke-width": 2, d: `M${steps.map((x, k) => `${f.across(x).toFixed(1)} ${f.up(change[k]).toFixed(1)}`).join("L")}`}));
  box.append(f.svg);
};

// --- tables -----------------------------------------------------------------------------------------------

// Rows of values under headings that sort them, and a field that keeps the rows with a word.
function rowTable(box, headings, rows, caption) {
  let order = null, falling = false, wanted = "";
  const body = h("tbody", {}), count = h("p", {class: "faint", "aria-live": "polite"});
  const number = headings.map((_, j) => rows.some((row) => typeof row[j] === "number"));
  const show = () => {
    let kept = rows.filter((row) => row.some((value) => String(value ?? "").toLowerCase().includes(wanted)));
    if (order !== null) kept = [...kept].sort((a, b) => {
      if (a[order] === null || b[order] === null) return (a[order] === null) - (b[order] === null);
      const less = typeof a[order] === "number" && typeof b[order] === "number" ? a[order] - b[order] : String(a[order]).localeCompare(String(b[order]), "en", {numeric: true});
      return falling ? -less : less;
    });
    body.replaceChildren(...kept.map((row) => h("tr", {}, row.map((value, j) => h(j ? "td" : "th", {scope: j ? null : "row", class: number[j] ? "number" : null}, value === null ? "" : num(value))))));
    if (wanted) count.textContent = `${kept.length} of ${rows.length} rows`; else count.textContent = "";
    heads.forEach((head, j) => head.setAttribute("aria-sort", j === order ? (falling ? "descending" : "ascending") : "none"));
  };
  const heads = headings.map((words, j) => h("th", {scope: "col"}, h("button", {type: "button", onclick: () => { falling = order === j && !falling; order = j; show(); }}, words)));
  const id = fresh("search");
  if (rows.length > 6) box.append(h("div", {class: "controls"}, h("label", {for: id}, "search", h("input", {id, type: "search", oninput: (event) => { wanted = event.target.value.trim().toLowerCase(); show(); }}))));
  box.append(h("div", {class: "scroll tall", tabindex: 0, role: "region", "aria-label": caption}, h("table", {class: "rows"}, h("thead", {}, h("tr", {}, heads)), body)), count);
  show();
}

const drawTable = (view, box) => {
  const {figure, data} = view, [dim] = Object.keys(data.dims), coords = Object.keys(data.coords), names = Object.keys(data.variables);
  const headings = [dim, ...coords, ...names].map((name) => {
    const variable = data.variables[name];
    return variable && variable.units && variable.units !== "1" ? `${name.replace(/_/g, " ")} (${variable.units})` : name.replace(/_/g, " ");
  });
  rowTable(box, headings, data.dims[dim].map((label, i) => [label, ...coords.map((c) => data.coords[c].values[i]), ...names.map((name) => at(data, name, {[dim]: i}))]), figure.title);
  const told = names.filter((name) => data.variables[name].words);
  if (told.length) box.append(h("p", {class: "faint"}, told.map((name) => `${name.replace(/_/g, " ")}: ${data.variables[name].words}`).join("; ") + "."));
};

const KINDS = {
  lines: {draw: drawLines, drawn: (figure) => ["step", figure.series]},
  multiples: {draw: drawMultiples, drawn: (figure) => ["step", figure.series, figure.panels]},
  map: {draw: drawMap, drawn: () => ["site", "step"], moves: true},
  scatter: {draw: drawScatter, drawn: () => ["site", "step"], moves: true, fixed: true},
  transfer: {draw: drawTransfer, drawn: () => ["step", "source_step"]},
  stack: {draw: drawStack, drawn: (figure) => ["step", figure.parts], fixed: true},
  table: {draw: drawTable, drawn: (figure) => Object.keys(figure.data.dims), fixed: true},
};

// --- the page ---------------------------------------------------------------------------------------------

function build(figure) {
  const kind = KINDS[figure.kind], drawn = kind.drawn(figure), view = viewOf(figure, figure.kind === "stack" ? [figure.parts] : figure.kind === "scatter" ? ["site"] : drawn.filter((dim) => figure.data.dims[dim]));
  if (kind.fixed) view.variables = view.variables.slice(0, 1);
  if (figure.kind === "stack" && figure.parts !== "site") view.levels = [];
  const chooser = h("div", {class: "controls"}), picture = h("div", {class: "picture"}), shell = h("code", {}), python = h("code", {}), title = fresh("figure");
  const numbers = h("details", {ontoggle: () => {
    if (!numbers.open || numbers.children.length > 1) return;
    const [headings, ...rows] = tidy(figure.data), box = h("div", {});
    numbers.append(box);
    rowTable(box, headings, rows.slice(0, SHOWN), `Numbers of ${figure.title}`);
    if (rows.length > SHOWN) box.append(h("p", {class: "faint"}, `The first ${SHOWN} of ${rows.length} rows; all of them are in the CSV.`));
  }}, h("summary", {}, "The numbers"));
  const element = h("figure", {id: fresh("picture"), "aria-labelledby": title, "data-kind": figure.kind},
    h("figcaption", {}, h("h3", {id: title}, figure.title), h("p", {}, figure.says)), chooser, picture,
    h("div", {class: "below"},
      h("button", {type: "button", class: "save", onclick: () => save(`${figure.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "")}.csv`, csv(figure.data)), "aria-label": `Save the data of “${figure.title}” as CSV`}, "CSV"),
      figure.kind === "table" ? null : numbers,
      h("details", {}, h("summary", {}, "How to make this"), figure.commands.length ? h("pre", {tabindex: 0}, shell) : null, h("pre", {tabindex: 0}, python))));
  const draw = () => {
    picture.replaceChildren();
    const told = kind.draw(view, picture) || {kept: drawn};
    const seen = told.step === undefined ? view : {...view, place: {...view.place, step: told.step}};
    const kept = [...drawn.filter((dim) => dim !== "step"), ...told.kept];
    shell.textContent = figure.commands.map((line) => filled(line, seen, kept, told.draw)).join("\n");
    python.textContent = filled(figure.python, seen, kept, told.draw);
  };
  view.redraw = () => {
    const keep = document.activeElement && picture.contains(document.activeElement) ? document.activeElement.getAttribute("data-keep") || document.activeElement.getAttribute("aria-label") : null;
    draw();
    const again = keep && [...picture.querySelectorAll("button, input")].find((e) => e.getAttribute("data-keep") === keep || e.getAttribute("aria-label") === keep);
    if (again) again.focus();
  };
  chooser.append(...controls(view, drawn, () => view.redraw()));
  if (!chooser.children.length) chooser.remove();
  if (figure.kind === "table") { queueMicrotask(draw); return element; }
  const one = {element, moves: kind.moves || figure.checkpoints !== undefined, width: 0, stale: true,
    draw: () => { one.stale = false; one.width = picture.clientWidth; view.redraw(); }};
  redraws.push(one);
  return element;
}

// What is in sight is drawn at once, the rest when it comes into sight.
const seen = new Set();
function refresh(which) {
  for (const one of redraws) if (which(one)) { one.stale = true; if (seen.has(one.element)) one.draw(); }
}
const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (!entry.isIntersecting) { seen.delete(entry.target); return; }
  seen.add(entry.target);
  const one = redraws.find((each) => each.element === entry.target);
  if (one && one.stale) one.draw();
}), {rootMargin: "600px"});
const sizes = new ResizeObserver((entries) => entries.forEach((entry) => {
  const one = redraws.find((each) => each.element === entry.target), width = Math.round(entry.contentRect.width);
  if (one && width && one.width !== width) refresh((each) => each === one);
}));

const place = document.getElementById("sections"), contents = document.getElementById("contents");
for (const section of page.sections) {
  const id = section.title.toLowerCase().replace(/[^a-z]+/g, "-");
  contents.append(h("li", {}, h("a", {href: `#${id}`}, section.title)));
  place.append(h("section", {"aria-labelledby": id}, h("h2", {id}, section.title), h("p", {}, section.says), h("div", {class: "figures"}, section.figures.map(build))));
}
contents.append(h("li", {}, h("a", {href: "#the-run"}, "The run")));

function phaseOf(step) {
  const passed = Object.entries(page.phases).filter(([name, first]) => name !== "end" && first <= step);
  if (!passed.length) return "";
  const [name, first] = passed[passed.length - 1];
  return `, ${name} step ${step - first}`;
}
if (page.steps.length > 1) {
  const slider = document.getElementById("step"), words = document.getElementById("step-words");
  const move = () => {
    now = page.steps[slider.value];
    words.textContent = `step ${now}${phaseOf(now)}`;
    slider.setAttribute("aria-valuetext", words.textContent);
    refresh((one) => one.moves);
  };
  slider.max = page.steps.length - 1;
  slider.value = page.steps.length - 1;
  document.getElementById("slider").hidden = false;
  slider.addEventListener("input", move);
  move();
}

const root = document.documentElement, theme = document.getElementById("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
const themed = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `${isDark() ? "Light" : "Dark"} colours`); refresh(() => true); };
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; themed(); });
dark.addEventListener("change", themed);
themed();
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, {passive: true});

let before = null;   // on paper everything is light, drawn, and says how it was made
addEventListener("beforeprint", () => {
  before = root.dataset.theme;
  root.dataset.theme = "light";
  document.querySelectorAll(".below > details:last-child").forEach((each) => { each.open = true; });
  redraws.forEach((one) => one.draw());
});
addEventListener("afterprint", () => {
  if (before === undefined) delete root.dataset.theme; else root.dataset.theme = before;
  document.querySelectorAll(".below > details").forEach((each) => { each.open = false; });
  refresh(() => true);
});

for (const one of redraws) { watcher.observe(one.element); sizes.observe(one.element); }
})();
