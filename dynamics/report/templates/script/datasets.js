// A Dataset: its values, units, table and CSV.

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
