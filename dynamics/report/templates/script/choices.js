// What is pointed at, and what is chosen of a figure.

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
