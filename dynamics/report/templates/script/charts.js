// Axes, curves and legends.

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
