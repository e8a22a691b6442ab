// The page: its sections, the slider over checkpoints, themes and paper.

const SHOWN = 2000;       // rows of numbers below a picture

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
