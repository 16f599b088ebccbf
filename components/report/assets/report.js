// The run report: tables and curves of the runs in `data`. Charts are drawn as SVG from numbers alone.
const W = 440, H = 210, LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 26;
const DASHES = ["", "7 4", "2 4", "9 3 2 3", "1 3"];
const hidden = new Set();
const charts = [];
const colour = (run) => `var(--s${run % 5})`;
// Beyond five runs colours come again, with other dashes.
const dash = (run) => DASHES[(run + Math.floor(run / 5)) % 5];
const many = data.runs.length > 1;

function swatch(run) {
  const box = make("span");
  box.innerHTML = `<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><line x1="1" x2="21" y1="4" y2="4" stroke-width="2.5" `
    + `stroke="${colour(run)}" stroke-dasharray="${dash(run)}"/></svg>`;
  return box.firstChild;
}

function significant(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  const text = size < 1e-3 || size >= 1e5 ? value.toExponential(1).replace("e+", "e")
    : size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(size < 0.1 ? 4 : 3);
  return text.replace("-", value < 0 && !text.includes("e-") ? MINUS : "-");
}

// Round numbers that cover low..high.
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const out = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) out.push(index * step);
  return out;
}

function tickText(value, all) {
  const step = all.length > 1 ? all[1] - all[0] : Math.abs(value) || 1;
  const size = Math.max(...all.map(Math.abs));
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  return value.toFixed(Math.max(0, Math.min(6, Math.ceil(-Math.log10(step) - 1e-9)))).replace("-", MINUS);
}

// Mean over a window of a twentieth of the points on each side, for curves of many noisy points, and its interval of 95%.
function smooth(points) {
  const reach = Math.floor(points.length / 20);
  return points.map(([step], place) => {
    const window = points.slice(Math.max(0, place - reach), place + reach + 1);
    const mean = window.reduce((sum, point) => sum + point[1], 0) / window.length;
    const variance = window.reduce((sum, point) => sum + (point[1] - mean) ** 2, 0) / (window.length - 1);
    const margin = 1.96 * Math.sqrt(variance / window.length);
    return [step, mean, mean - margin, mean + margin];
  });
}

// The pieces of a line between points without a value.
function unbroken(points) {
  const pieces = [[]];
  for (const point of points) point[1] == null ? pieces.push([]) : pieces.at(-1).push(point);
  return pieces.filter((piece) => piece.length);
}

// `lines` are lists of [x, value], [x, value, margin] or [x, value, low, high, ...], coloured by their place; `unit` names x.
// `ribbon` fills the area between each low and high instead of drawing bars.
function chart(title, lines, { unit = "step", ribbon = false, isShown = () => true } = {}) {
  const svgBox = make("div"), readout = make("div", { class: "readout" });
  const figure = make("figure", { tabindex: 0, "aria-label": title }, make("figcaption", {}, title), svgBox, readout);
  const all = lines.map((points) => (points ?? []).filter((point) => point[1] != null));
  const low = ([, value, a, b]) => (b != null ? a : value - (a ?? 0)), high = ([, value, a, b]) => (b != null ? b : value + (a ?? 0));
  let scale = null, cursor = null;

  function draw() {
    const series = all.map((points, run) => ({ run, points })).filter(({ run, points }) => points.length && isShown(run));
    const steps = series.flatMap(({ points }) => points.map((point) => point[0]));
    const values = series.flatMap(({ points }) => points.flatMap((point) => [low(point), high(point)]));
    if (!steps.length) { svgBox.replaceChildren(); readout.textContent = "no values"; scale = null; return; }
    let bottom = Math.min(...values), top = Math.max(...values);
    const pad = (top - bottom) * 0.06 || Math.abs(top) * 0.1 || 1;
    if (bottom !== 0) bottom -= pad;
    top += pad;
    const first = Math.min(...steps), last = Math.max(...steps, first + 1);
    const x = (step) => LEFT + 12 + ((step - first) / (last - first)) * (W - LEFT - RIGHT - 24);
    const y = (value) => TOP + ((top - value) / (top - bottom)) * (H - TOP - BOTTOM);
    scale = { x, y, series, steps: [...new Set(steps)].sort((a, b) => a - b) };
    const at = (place) => place.toFixed(1);
    const yTicks = ticks(bottom, top, 5), xTicks = ticks(first, last, 5).filter(Number.isInteger);
    const parts = yTicks.map((value) => `<line class="rule" x1="${LEFT}" x2="${W - RIGHT}" y1="${at(y(value))}" y2="${at(y(value))}"/>`
      + `<text x="${LEFT - 7}" y="${at(y(value) + 4)}" text-anchor="end">${tickText(value, yTicks)}</text>`);
    parts.push(...xTicks.map((step) => `<text x="${at(x(step))}" y="${H - 8}" text-anchor="middle">${step}</text>`));
    for (const { run, points } of series) {
      const path = (list) => list.map((point) => `${at(x(point[0]))},${at(y(point[1]))}`).join(" ");
      const stroke = `stroke="${colour(run)}"`, dashes = `stroke-dasharray="${dash(run)}"`;
      const noisy = points.length > 60 && !ribbon, smoothed = noisy ? smooth(points) : points;
      const area = (from) => parts.push(`<polygon class="area" fill="${colour(run)}" points="${path(smoothed.map((p) => [p[0], p[from]]))} `
        + `${path(smoothed.map((p) => [p[0], p[from + 1]]).reverse())}"/>`);
      if (noisy) area(2);
      if (ribbon) { area(2); area(4); }
      if (noisy) parts.push(`<polyline class="line faint" ${stroke} points="${path(points)}"/>`);
      const pieces = noisy || ribbon ? [smoothed] : unbroken(lines[run]);
      parts.push(...pieces.map((piece) => `<polyline class="line" ${stroke} ${dashes} points="${path(piece)}"/>`));
      // Side by side, so that the intervals of several runs at one step can be told apart.
      const aside = (run - (all.length - 1) / 2) * 4;
      for (const point of points) {
        const place = at(x(point[0]) + (!ribbon && high(point) > low(point) ? aside : 0));
        if (!ribbon && high(point) > low(point)) {
          parts.push(`<line class="bar" ${stroke} x1="${place}" x2="${place}" y1="${at(y(low(point)))}" y2="${at(y(high(point)))}"/>`);
        }
        if (points.length <= 15) parts.push(`<circle r="2.8" fill="${colour(run)}" cx="${place}" cy="${at(y(point[1]))}"/>`);
      }
    }
    parts.push(`<line class="cursor" y1="${TOP}" y2="${H - BOTTOM}" visibility="hidden"/>`);
    svgBox.innerHTML = `<svg viewBox="0 0 ${W} ${H}" aria-hidden="true">${parts.join("")}</svg>`;
    read(null);
  }

  function read(step) {
    cursor = step;
    if (!scale) return;
    const line = svgBox.querySelector(".cursor");
    line.setAttribute("visibility", step == null ? "hidden" : "visible");
    const shownStep = step ?? scale.steps.at(-1);
    line.setAttribute("x1", scale.x(shownStep));
    line.setAttribute("x2", scale.x(shownStep));
    readout.replaceChildren(make("span", {}, `${unit} ${shownStep}`), ...scale.series.flatMap(({ run, points }) => {
      const point = points.find((each) => each[0] === shownStep);
      if (!point) return [];
      const spread = point[3] != null ? ` (${significant(point[2])} to ${significant(point[3])})` : point[2] ? ` ± ${significant(point[2])}` : "";
      return [make("span", {}, all.length > 1 ? swatch(run) : "", make("b", {}, significant(point[1])), spread)];
    }));
  }

  figure.addEventListener("pointermove", (event) => {
    if (!scale) return;
    const box = svgBox.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * W;
    read(scale.steps.reduce((best, step) => (Math.abs(scale.x(step) - place) < Math.abs(scale.x(best) - place) ? step : best)));
  });
  figure.addEventListener("pointerleave", () => read(null));
  figure.addEventListener("blur", () => read(null));
  figure.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !scale) return;
    event.preventDefault();
    const place = cursor == null ? scale.steps.length - 1 : scale.steps.indexOf(cursor);
    read(scale.steps[Math.max(0, Math.min(scale.steps.length - 1, place + by))]);
  });
  charts.push(draw);
  draw();
  return figure;
}

function section(id, heading, note, ...content) {
  byId("main").append(make("section", { id }, make("h2", {}, heading), make("p", { class: "soft" }, note), ...content.filter(Boolean)));
}

// A cell is a text or a list of nodes; an empty first cell continues the row above. `numbers` are the columns from..to.
function table(headings, rows, [from, to]) {
  const cell = (tag, value, column) => make(tag, { class: column >= from && column < to ? "number" : null },
    ...(Array.isArray(value) ? value : [value]));
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...headings.map((heading, column) => cell("th", heading, column)))),
    make("tbody", {}, ...rows.map((row) => make("tr", { class: row[0] === "" ? "goes-on" : null },
      ...row.map((value, column) => cell("td", value, column)))))));
}

const labelled = (number, name) => [make("span", { class: "name" }, swatch(number), name)];
const named = (run) => (many ? labelled(run, data.runs[run].name) : [data.runs[run].name]);

function showChanges() {
  const rows = data.validation.flatMap(([metric, title]) => data.runs.flatMap((run, number) => {
    const change = run.changes.find((each) => each.metric === metric);
    if (!change) return [];
    const ratio = change.error ? change.change / change.error : null;
    return [{ title, number, change, ratio }];
  }));
  if (!rows.length) return;
  let previous = null;
  const cells = rows.map(({ title, number, change, ratio }) => {
    const first = title !== previous;
    previous = title;
    const far = ratio != null && Math.abs(ratio) >= 2;
    return [first ? title : "", ...(many ? [named(number)] : []), `${shown(change.before, 4)}`, shown(change.after, 4),
      [make("span", { class: far ? "clear" : null }, `${shown(change.change, 4, true)} ± ${shown(change.error, 4)}`)],
      shown(ratio, 1, true)];
  });
  const steps = new Set(rows.map(({ change }) => `${change.first} ${change.last}`));
  const { first, last } = rows[0].change;
  const headings = steps.size === 1 ? [`step ${first}`, `step ${last}`] : ["first", "last"];
  const sizes = new Set(data.runs.filter((run) => run.changes.length).map((run) => (
    `${run.rows} held-out rows${run.groups ? ` in ${run.groups} groups` : ""}`)));
  section("changes", "Before and after", `${[...sizes].join(" and ")}, with the same anchors and random numbers each time: `
    + "errors are of the paired difference, row by row, rows of a group taken together. Bold: more than two standard errors.",
  table(["metric", ...(many ? ["run"] : []), ...headings, "change ± standard error", "in standard errors"], cells, many ? [2, 6] : [1, 5]));
}

function showTime() {
  const timed = data.runs.map((run, number) => [run, number]).filter(([run]) => Object.keys(run.seconds).length);
  if (!timed.length) return;
  const phases = [...new Set(timed.flatMap(([run]) => Object.keys(run.seconds)))];
  const longest = Math.max(...timed.map(([run]) => total(run)));
  const tint = (phase) => `color-mix(in srgb, var(--s0) ${Math.round(100 - (80 * phases.indexOf(phase)) / Math.max(1, phases.length - 1))}%, var(--line))`;
  const bars = timed.map(([run, number]) => make("div", { class: "row" },
    make("div", { class: "name" }, ...named(number), make("span", { class: "soft" }, `  ${shown(total(run), 1)} s a step${memory(run)}`)),
    make("div", { class: "stack", style: `width: ${((100 * total(run)) / longest).toFixed(1)}%` },
      ...Object.entries(run.seconds).map(([phase, seconds]) =>
        make("i", { style: `flex: ${seconds} 0 0; background: ${tint(phase)}`, title: `${phase} ${shown(seconds)} s` }))),
    make("div", { class: "parts" }, ...Object.entries(run.seconds).map(([phase, seconds]) => make("span", {},
      make("i", { style: `background: ${tint(phase)}` }), `${phase} ${shown(seconds, seconds < 1 ? 2 : 1)} s, ${shown((100 * seconds) / total(run), 0)} %`)))));
  section("time", "Time and memory", "Mean over the logged steps; other is what no phase accounts for. Memory is the largest of any step.", make("div", { class: "phases" }, ...bars));
}

const total = (run) => Object.values(run.seconds).reduce((sum, seconds) => sum + seconds, 0);

function memory(run) {
  const points = run.training.peak_memory_gib;
  return points ? `, ${shown(Math.max(...points.map((point) => point[1])), 1)} GiB at the peak` : "";
}

function showAdvantages() {
  const kept = data.runs.map((run, number) => [run, number]).filter(([run]) => run.advantages.length);
  if (!kept.length) return;
  section("advantages", "Advantages", "Of the rollouts that were kept: the median, and where the middle 50 % and 90 % of them lie.",
    make("div", { class: "grid" }, ...kept.map(([run, number]) =>
      chart(run.name, data.runs.map((_, other) => (other === number ? run.advantages : [])), { ribbon: true }))));
}

function bounds(interval, digits, sign) {
  return interval ? `${shown(interval[0], digits, sign)} to ${shown(interval[1], digits, sign)}` : "–";
}

function showEvaluation(measure, number) {
  const { checkpoints, compare_with: others } = measure;
  const rows = Object.entries(measure.metrics).flatMap(([metric, found]) => checkpoints.filter((name) => found[name]).map((name, place) => {
    const each = found[name];
    const paired = others.map((other) => each.differences[other]).flatMap((to) => (to ? [shown(to.value, 4, true), bounds(to.interval, 4, true)] : ["", ""]));
    return [place === 0 ? metric.replaceAll("_", " ") : "", labelled(checkpoints.indexOf(name), name), shown(each.value, 4),
      bounds(each.interval, 4, false), ...paired];
  }));
  // The values, then the differences to each of the others.
  const drawn = (curve, points, title, pick) => chart(`${curve.replaceAll("_", " ")}${title}`, checkpoints.map((name) =>
    Object.entries(points).filter(([, found]) => found[name] && pick(found[name])).map(([at, found]) =>
      [Number(at), pick(found[name]).value, ...(pick(found[name]).interval ?? [])])), { unit: "token" });
  const curves = Object.entries(measure.curves).flatMap(([curve, points]) => [drawn(curve, points, "", (each) => each),
    ...(checkpoints.length > 1 ? others : []).map((other) => drawn(curve, points, `, minus ${other}`, (each) => each.differences[other]))]);
  const notes = Object.entries(measure.notes).map(([metric, note]) => ` ${metric}: ${note}.`).join("");
  section(`evaluation-${number}`, measure.name, `${measure.rows} rows in ${measure.groups} groups; ${measure.intervals}.${notes}`,
  rows.length ? table(["metric", "checkpoint", "value", "interval", ...others.flatMap((other) => [`minus ${other}`, "interval"])], rows, [2, 4 + 2 * others.length]) : null,
  curves.length ? make("p", { class: "key" }, ...checkpoints.flatMap((name, place) => labelled(place, name))) : null,
  make("div", { class: "grid" }, ...curves));
}

function showDifferences() {
  if (!many) return;
  const rows = data.differences.map(([key, ...values]) => [[make("code", {}, key)],
    ...values.map((value) => (value == null ? "absent" : [make("code", {}, value)]))]);
  const known = rows.length ? "What config.yaml of the runs does not have in common, apart from where they were written."
    : "The runs' config.yaml say the same, apart from where they were written.";
  section("differences", "Config", known, ...(rows.length ? [table(["key", ...data.runs.map((_, run) => named(run))], rows, [9e9, 9e9])] : []));
}

byId("name").textContent = data.name;
if (many) {
  byId("legend").append(...data.runs.map((run, number) => make("button", {
    type: "button", "aria-pressed": "true", title: "show or hide", onclick: (event) => {
      if (!hidden.delete(number)) hidden.add(number);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(number)));
      charts.forEach((draw) => draw());
    },
  }, swatch(number), run.name)));
} else byId("legend").hidden = true;

// Curves of `kind` ("training" or "validation"), one figure a metric; those that are no metrics of ours are folded away.
function showCurves(kind, heading, note) {
  const figures = (metrics) => make("div", { class: "grid" }, ...metrics.map(([metric, title]) =>
    chart(title, data.runs.map((run) => run[kind][metric]), { isShown: (run) => !hidden.has(run) })));
  const known = data[kind].filter((entry) => entry[2]), others = data[kind].filter((entry) => !entry[2]);
  if (!data[kind].length) return;
  section(kind, heading, note, figures(known),
    others.length ? make("details", {}, make("summary", {}, `${others.length} more`), figures(others)) : null);
}

showChanges();
showCurves("validation", "Validation", "Bars are intervals of 95 % of the change since the first validation, row by row.");
showCurves("training", "Training", "Of each step's own batch. Curves of more than 60 points are drawn faint, with their running mean and its interval of 95 %.");
showAdvantages();
showTime();
data.evaluations.forEach(showEvaluation);
showDifferences();
