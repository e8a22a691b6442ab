// Tables that sort and search.

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
