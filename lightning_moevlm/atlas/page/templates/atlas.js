"use strict";
// Draws the overview, filters it, and shows the sheet of an expert. All content of the data is set as text, never as HTML.
const atlas = JSON.parse(document.getElementById("content").textContent);
const titles = Object.fromEntries(atlas.labels.map((each) => [each.name, each.title]));
const kinds = [...new Set(atlas.labels.map((each) => kindOf(each.name)))];
const letters = { modality: "M", position: "P", colour: "C", word: "W", "word class": "S", object: "O", category: "K",
  "object colour": "F", "question kind": "Q", class: "L" };
const grid = document.getElementById("grid"), sheet = document.getElementById("sheet");
const words = document.getElementById("words"), shown = document.getElementById("shown");
const cells = [];
let images = null; // parsed when the first sheet is opened

function kindOf(label) { return label.replace(/^(image|text)\//, ""); }

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value; else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function percent(share) { return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`; }
function number(value, digits = 2) { return value === null ? "–" : value >= 100 ? value.toFixed(0) : value.toFixed(digits); }
function showP(p) { return p < 1e-4 ? "< 0.0001" : p < 0.01 ? p.toPrecision(2) : p.toFixed(2); }

function paint(element, label, strength) {
  const mix = Math.round(18 + 42 * Math.min(1, Math.sqrt(strength)));
  element.style.background = label ? `color-mix(in srgb, var(--k${kinds.indexOf(kindOf(label)) % 10}) ${mix}%, var(--ground))` : "";
}

function drawOverview() {
  const widest = Math.max(...atlas.layers.map((layer) => layer.experts));
  grid.classList.toggle("many", widest > 16);
  const head = make("tr", {}, make("th", { scope: "col" }, "layer"));
  for (let expert = 0; expert < widest; expert++) head.append(make("th", { scope: "col" }, String(expert)));
  const body = make("tbody");
  atlas.layers.forEach((layer, row) => {
    const line = make("tr", {}, make("th", { scope: "row" }, layer.layer));
    const buttons = layer.sheets.map((one, expert) => {
      const button = make("button", { type: "button", tabindex: row || expert ? "-1" : "0", "aria-pressed": "false" });
      button.addEventListener("click", () => open(row, expert, true));
      button.addEventListener("keydown", (event) => move(event, row, expert));
      line.append(make("td", {}, button));
      const said = [layer.layer, ...one.serves.flatMap((claim) => [claim.label, claim.value]),
        ...one.words.flatMap((each) => [each.before, each.word, each.after]), ...one.patches.map((each) => each.caption)];
      return { button, text: said.join("\n").toLowerCase() };
    });
    cells.push(buttons);
    body.append(line);
  });
  grid.append(make("table", {}, make("caption", {}, "Experts by layer"), make("thead", {}, head), body));
}

function colour() {
  const asked = shown.value, used = new Set();
  atlas.layers.forEach((layer, row) => layer.sheets.forEach((one, expert) => {
    const claim = one.serves.find((each) => !asked || each.label === asked);
    const { button } = cells[row][expert], kind = claim ? kindOf(claim.label) : "";
    button.replaceChildren(kind ? letters[kind] || kind[0].toUpperCase() : "·", make("span", {}, claim ? claim.value : ""));
    const what = claim ? `serves ${titles[claim.label]}: ${claim.value}, lift ${number(claim.lift)}` : "nothing beyond chance and simple rules";
    button.setAttribute("aria-label", `${layer.layer}, expert ${expert}: ${what}`);
    button.title = `expert ${expert}: ${what}`;
    paint(button, claim && claim.label, claim ? claim.nmi : 0);
    if (kind) used.add(kind);
  }));
  const legend = document.getElementById("legend");
  legend.replaceChildren(...kinds.filter((kind) => used.has(kind)).map((kind) => {
    const mark = make("b", {}, letters[kind] || kind[0].toUpperCase());
    paint(mark, kind, 0.5);
    return make("li", {}, mark, kind);
  }), make("li", {}, make("b", {}, "·"), "explained by chance or a simple rule"));
}

function filter() {
  const asked = words.value.trim().toLowerCase();
  let hits = 0, all = 0;
  cells.flat().forEach(({ button, text }) => {
    const matches = !asked || text.includes(asked);
    button.classList.toggle("dim", !matches);
    hits += matches; all += 1;
  });
  document.getElementById("hits").textContent = asked ? `${hits} of ${all} experts` : "";
}

function move(event, row, expert) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const line = cells[Math.min(Math.max(row + step[0], 0), cells.length - 1)];
  const next = line[Math.min(Math.max(expert + step[1], 0), line.length - 1)].button;
  cells.flat().forEach(({ button }) => { button.tabIndex = -1; });
  next.tabIndex = 0;
  next.focus();
}

function table(caption, columns, rows) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const lines = rows.map((row) => make("tr", {}, ...row.map((cell, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, cell))));
  return make("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...lines)));
}

function folded(title, content) { return make("details", {}, make("summary", {}, title), content); }

function patchFigure(one) {
  const side = atlas.grid, window = Math.min(side, 8), row = one.row - 1, column = one.column - 1;
  const top = Math.min(Math.max(row - (window >> 1), 0), side - window);
  const left = Math.min(Math.max(column - (window >> 1), 0), side - window);
  const where = `row ${one.row}, column ${one.column}`;
  images ??= JSON.parse(document.getElementById("images").textContent);
  const image = make("img", { src: images[one.image], alt: `Patch in ${where} of: ${one.caption || one.key}`, loading: "lazy" });
  Object.assign(image.style, { width: `${100 * side / window}%`, height: `${100 * side / window}%`, left: `${-100 * left / window}%`, top: `${-100 * top / window}%` });
  const mark = make("i");
  Object.assign(mark.style, { left: `${100 * (column - left) / window}%`, top: `${100 * (row - top) / window}%`, width: `${100 / window}%`, height: `${100 / window}%` });
  return make("li", {}, make("figure", {}, make("div", { class: "patch" }, image, mark),
    make("figcaption", {}, `${where}, weight ${number(one.weight)}`)));
}

function labelPart(layer, one) {
  const result = layer.results.find((each) => each.label === one.label);
  const rows = one.values.map(([value, count, share, lift, low, high]) =>
    [result.values[value], number(count, 0), percent(share), percent(result.base[value]), `${number(lift)} [${number(low)}, ${number(high)}]`]);
  const nulls = Object.entries(one.p_of_null).map(([name, p]) => `${name} ${showP(p)}`).join(", ");
  const sure = one.adjusted_p <= atlas.alpha;
  const [weakest] = Object.entries(one.p_of_null).reduce((a, b) => (b[1] > a[1] ? b : a));
  const verdict = make("p", {}, make("span", sure ? { class: "yes" } : {}, sure ? "specialised" : `no claim beyond ${weakest}`),
    ` · NMI ${number(one.nmi, 3)} · p ${showP(one.adjusted_p)} after Holm (${nulls}) · entropy ${number(one.entropy)} of ${number(result.entropy)}`);
  return make("div", {}, make("h4", {}, titles[one.label]), verdict,
    rows.length ? table(`${titles[one.label]}: values above their base first`, ["value", "tokens", "share", "base", "lift [95 %]"], rows) : make("p", {}, "no token"));
}

function partners(title, { layer: place, experts: found }) {
  if (!found.length) return null;
  const layer = atlas.layers[place].layer;
  const rows = found.map((each) => [`expert ${each.expert}`, percent(each.share), percent(each.base)]);
  return folded(title, table(`${title} (${layer})`, ["expert", "share of tokens", "base"], rows));
}

function open(row, expert, jump) {
  const layer = atlas.layers[row], one = layer.sheets[expert];
  cells.flat().forEach(({ button }) => { button.setAttribute("aria-pressed", "false"); button.tabIndex = -1; });
  cells[row][expert].button.setAttribute("aria-pressed", "true");
  cells[row][expert].button.tabIndex = 0;
  document.getElementById("sheet-title").textContent = `${layer.layer}, expert ${expert}`;
  const body = document.getElementById("sheet-body");
  body.replaceChildren(make("ul", { class: "facts" },
    make("li", {}, `load ${percent(one.load)} (even: ${percent(1 / layer.experts)})`),
    make("li", {}, `mean weight of its tokens ${number(one.weight)}`)));
  const claims = one.serves.map((claim) => make("li", {}, make("strong", {}, `${titles[claim.label]}: ${claim.value}`),
    ` – ${percent(claim.share)} of its tokens with this label, ${percent(claim.base)} of all such tokens; lift ${number(claim.lift)} [${number(claim.low)}, ${number(claim.high)}], p ${showP(claim.p)}`));
  body.append(claims.length ? make("ul", {}, ...claims) : make("p", {}, "Nothing that it serves is beyond the null models of its label."));
  const drawn = one.patches.filter((each) => each.image !== null);
  if (drawn.length) {
    body.append(make("h3", {}, "Patches with the largest weight"), make("ul", { class: "gallery" }, ...drawn.map(patchFigure)),
      folded("Numbers of this gallery", table("Patches with the largest weight", ["sample", "place", "weight", "text"],
        drawn.map((each) => [each.key, `row ${each.row}, column ${each.column}`, number(each.weight, 3), each.caption]))));
  }
  if (one.words.length) {
    body.append(make("h3", {}, "Words with the largest weight"), make("ul", { class: "contexts" }, ...one.words.map((each) =>
      make("li", { title: `${each.key}, weight ${number(each.weight, 3)}` }, make("span", {}, each.before), make("mark", {}, each.word), make("span", {}, each.after)))));
  }
  body.append(make("h3", {}, "Labels"), make("div", { class: "labels" }, ...one.labels.filter((each) => each.values.length).map((each) => labelPart(layer, each))));
  const near = [partners("Experts that serve the same tokens", one.together),
    partners("Where its tokens come from", one.before), partners("Where its tokens go", one.next)].filter(Boolean);
  if (near.length) body.append(make("h3", {}, "Other experts"), ...near);
  sheet.hidden = false;
  if (jump) { history.replaceState(null, "", `#expert-${row}-${expert}`); sheet.focus(); sheet.scrollIntoView({ block: "start" }); }
}

sheet.addEventListener("keydown", (event) => {
  if (event.key === "Escape") cells.flat().find(({ button }) => button.tabIndex === 0).button.focus();
});
document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
words.addEventListener("input", filter);
shown.append(...atlas.labels.map((each) => make("option", { value: each.name }, each.title)));
shown.addEventListener("change", colour);
drawOverview();
colour();
const asked = /^#expert-(\d+)-(\d+)$/.exec(location.hash);
if (asked && atlas.layers[asked[1]] && atlas.layers[asked[1]].sheets[asked[2]]) open(Number(asked[1]), Number(asked[2]), true);
document.documentElement.dataset.ready = String(Math.round(performance.now()));
