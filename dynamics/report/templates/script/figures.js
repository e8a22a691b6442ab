// Kinds of figures, each {drawn, draw}: dims that need no choice, and (view, box) -> what was drawn.

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

const KINDS = {
  lines: {draw: drawLines, drawn: (figure) => ["step", figure.series]},
  multiples: {draw: drawMultiples, drawn: (figure) => ["step", figure.series, figure.panels]},
  map: {draw: drawMap, drawn: () => ["site", "step"], moves: true},
  scatter: {draw: drawScatter, drawn: () => ["site", "step"], moves: true, fixed: true},
  transfer: {draw: drawTransfer, drawn: () => ["step", "source_step"]},
  stack: {draw: drawStack, drawn: (figure) => ["step", figure.parts], fixed: true},
  table: {draw: drawTable, drawn: (figure) => Object.keys(figure.data.dims), fixed: true},
};
