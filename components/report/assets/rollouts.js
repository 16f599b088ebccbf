// The rollout viewer. `state` says what is chosen; every change goes through show(), which draws everything from it.
const steps = data.steps.map((entry) => entry.step);
const state = { step: steps.length - 1, text: 0, block: null };
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const reward = (sample) => (sample.pointwise == null || sample.pairwise == null ? null : sample.pointwise + sample.pairwise);
const KEYS = { reward, alignment: (sample) => sample.pointwise };

const text = () => data.steps[state.step].texts[state.text];
const chosen = () => text().blocks[state.block];

// A token in one line: what indents would push the samples out of sight.
function visible(token) {
  return token === "" ? "◦" : token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/ {4,}/g, (run) => `␣${run.length}`);
}

function least(id) {
  return byId(id).value === "" ? -Infinity : Number(byId(id).value);
}

// A sample that is copied by a later one is no copy itself: "without copies" leaves one of each.
function passes(sample) {
  const copies = byId("copies").value;
  if (copies === "without" && sample.copy_of != null) return false;
  if (copies === "only" && sample.copy_of == null) return false;
  return (reward(sample) ?? -Infinity) >= least("least-reward") && (sample.pointwise ?? -Infinity) >= least("least-alignment");
}

// Samples of a block that pass the filters, as [number, sample], in the order asked for.
function samplesOf(block) {
  const [key, direction] = byId("sort").value.split("-");
  const listed = block.samples.map((sample, number) => [number, sample]).filter(([, sample]) => passes(sample));
  if (key === "copies") listed.sort(([, a], [, b]) => (b.copy_of != null) - (a.copy_of != null));
  else if (key !== "place") listed.sort(([, a], [, b]) => ordered(KEYS[key](a), KEYS[key](b), direction));
  return listed;
}

function ordered(a, b, direction) {
  if (a == null || b == null) return (a == null) - (b == null);
  return direction === "high" ? b - a : a - b;
}

// What is said of an anchor: means over its samples that pass. Anchors of which none does are left out.
function summaries() {
  const [key, direction] = byId("sort").value.split("-");
  const rows = text().blocks.map((block, number) => {
    const listed = samplesOf(block).map(([, sample]) => sample);
    const rewards = listed.map(reward).filter((value) => value != null);
    const aligned = listed.map(KEYS.alignment).filter((value) => value != null);
    return {
      number, block, listed, reward: mean(rewards), alignment: mean(aligned), best: rewards.length ? Math.max(...rewards) : null,
      copies: listed.filter((sample) => sample.copy_of != null).length,
    };
  }).filter((row) => row.block.counts && row.listed.length);
  if (key === "copies") rows.sort((a, b) => b.copies - a.copies);
  else if (key !== "place") rows.sort((a, b) => ordered(a[key], b[key], direction));
  return rows;
}

function tokenNode(token, logprob, counts, numbers) {
  const strength = logprob == null ? 0 : Math.min(1, -logprob / 5) * 34;
  const style = counts ? `background: color-mix(in srgb, var(--ink) ${strength.toFixed(0)}%, transparent)` : "";
  const title = counts ? `log-prob ${shown(logprob)}, probability ${logprob == null ? "–" : Math.exp(logprob).toFixed(3)}` : "after the stop";
  const attributes = { style, title, class: counts ? null : "dropped" };
  if (!numbers) return make("span", attributes, visible(token));
  return make("ruby", attributes, visible(token), make("rt", {}, shown(logprob, 1)));
}

function showSample(number, sample, largest) {
  const advantage = sample.advantage;
  const strength = largest ? Math.round((Math.abs(advantage ?? 0) / largest) * 80) + 20 : 20;
  const side = (advantage ?? 0) === 0 ? "var(--line)"
    : `color-mix(in srgb, var(${advantage > 0 ? "--accent" : "--other"}) ${strength}%, var(--line))`;
  const logprobs = sample.logprobs.filter((value, place) => value != null && sample.mask[place]);
  return make("li", { style: `--side: ${side}`, "data-sample": number },
    make("div", { class: "head" },
      make("span", { class: `advantage ${advantage > 0 ? "up" : advantage < 0 ? "down" : ""}`, title: "advantage" },
        shown(advantage, 2, true)),
      make("span", { class: "soft" }, `sample ${number + 1}`),
      make("span", { class: "soft" }, `reward ${shown(reward(sample))} = ${shown(sample.pointwise)} `
        + `${sample.pairwise > 0 ? "+" : MINUS} ${shown(Math.abs(sample.pairwise ?? 0))}`),
      make("span", { class: "soft" }, `mean log-prob ${shown(mean(logprobs))}`),
      sample.copy_of == null ? null : make("span", { class: "soft copy" }, `copy of ${sample.copy_of + 1}`)),
    make("p", { class: "tokens" }, ...sample.tokens.map((token, place) =>
      tokenNode(token, sample.logprobs[place], Boolean(sample.mask[place]), byId("numbers").checked))));
}

function showPanel(rows) {
  const block = chosen();
  const listed = block ? samplesOf(block) : [];
  const place = rows.findIndex((row) => row.number === state.block);
  byId("anchor").textContent = block ? `Anchor at token ${block.anchor}` : "No anchor passes the filters";
  byId("back").disabled = place <= 0;
  byId("on").disabled = place < 0 || place >= rows.length - 1;
  byId("sees").textContent = !block ? "" : block.counts
    ? `${place + 1} of ${rows.length}; its samples see the ${seen(block)} tokens of the document before it`
    : "does not count: it is not trained on";
  byId("truth").replaceChildren(...(block ? block.truth : []).map((token) => make("span", {}, visible(token))));
  byId("samples-label").textContent = block ? `samples, ${listed.length} of ${block.samples.length}` : "samples";
  const largest = Math.max(...text().blocks.flatMap((each) => each.samples.map((sample) => Math.abs(sample.advantage ?? 0))));
  byId("samples").replaceChildren(...listed.map(([number, sample]) => showSample(number, sample, largest)));
}

function seen(block) {
  const { documents } = text();
  const own = documents[block.anchor - 1];
  return documents.slice(0, block.anchor).filter((document) => document === own).length;
}

function showText(rows) {
  const { tokens, documents, blocks } = text();
  const passing = new Set(rows.map((row) => row.number));
  const marks = new Map(blocks.map((block, number) => [block.anchor, number]));
  const block = chosen();
  let nearest = null;
  const nodes = [];
  tokens.forEach((token, place) => {
    if (marks.has(place)) {
      nearest = marks.get(place);
      nodes.push(make("button", {
        type: "button", "data-block": nearest, tabindex: -1, title: `anchor at token ${place}`, "aria-label": `anchor at token ${place}`,
        class: ["mark", nearest === state.block && "chosen", !blocks[nearest].counts ? "void" : !passing.has(nearest) && "out"]
          .filter(Boolean).join(" "),
      }));
    }
    const inWindow = block && place >= block.anchor && place < block.anchor + block.truth.length;
    const seenHere = block && place < block.anchor && documents[place] === documents[block.anchor - 1];
    const end = place + 1 < tokens.length && documents[place + 1] !== documents[place];
    nodes.push(make("span", { "data-block": nearest, class: [inWindow ? "window" : block && !seenHere && "unseen", end && "end"]
      .filter(Boolean).join(" ") }, token === "" ? "◦" : token.replaceAll("\t", "    ")));
    if (end) nodes.push("\n");
  });
  const top = byId("reading").scrollTop;
  byId("reading").replaceChildren(...nodes);
  byId("reading").scrollTop = top;
}

// Every sample's reward over its anchor's place in the text. Only numbers enter the markup.
function showStrip(rows) {
  // As wide as it is shown, so that its type has the size of the page's.
  const W = Math.max(300, byId("strip").clientWidth), H = 120, left = 34, right = 8, top = 8, bottom = 18;
  const passing = new Map(rows.map((row) => [row.number, row.listed]));
  const counted = text().blocks.map((block, number) => ({ block, number })).filter(({ block }) => block.counts);
  const values = counted.flatMap(({ block }) => block.samples.map(reward)).filter((value) => value != null);
  if (!values.length) return byId("strip").replaceChildren();
  const low = Math.min(0, ...values), high = Math.max(...values, low + 1e-6);
  const length = text().tokens.length;
  const x = (place) => left + (place / length) * (W - left - right);
  const y = (value) => H - bottom - ((value - low) / (high - low)) * (H - top - bottom);
  const width = Math.max(4, Math.min(18, (W - left - right) / Math.max(1, counted.length) - 1));
  const rules = [low, ...(low < -0.2 * high ? [0] : []), high].map((value) => `<line x1="${left}" x2="${W - right}" y1="${y(value)}" y2="${y(value)}"/>`
    + `<text x="${left - 6}" y="${y(value) + 4}" text-anchor="end">${shown(value, 1)}</text>`);
  const columns = counted.map(({ block, number }) => {
    const kind = number === state.block ? " chosen" : passing.has(number) ? "" : " out";
    const dots = block.samples.map((sample) => reward(sample) == null ? ""
      : `<circle cx="${x(block.anchor).toFixed(1)}" cy="${y(reward(sample)).toFixed(1)}" r="2.6"/>`);
    return `<g class="column${kind}" data-block="${number}"><title>anchor at token ${block.anchor}</title>`
      + `<rect x="${(x(block.anchor) - width / 2).toFixed(1)}" y="${top - 6}" width="${width.toFixed(1)}" `
      + `height="${H - bottom - top + 12}" rx="2"/>${dots.join("")}</g>`;
  });
  byId("strip").innerHTML = `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="rewards of all samples along the text">`
    + `${rules.join("")}${columns.join("")}<text x="${left}" y="${H - 1}">reward of every sample</text>`
    + `<text x="${W - right}" y="${H - 1}" text-anchor="end">token ${length}</text></svg>`;
}

function showTable(rows) {
  byId("anchors").tBodies[0].replaceChildren(...rows.map((row) => make("tr",
    { "data-block": row.number, class: row.number === state.block ? "chosen" : null },
    make("td", {}, String(row.block.anchor)),
    make("td", {}, row.block.truth.map(visible).join("")),
    ...[row.reward, row.best, row.alignment].map((value) => make("td", { class: "number" }, shown(value))),
    make("td", { class: "number" }, row.copies ? String(row.copies) : "–"))));
}

// Draws everything; `reveal` also scrolls the text to the chosen anchor.
function show({ reveal = false } = {}) {
  const rows = summaries();
  const kept = chosen() && !chosen().counts ? true : rows.some((row) => row.number === state.block);
  if (!kept) state.block = rows.length ? rows[0].number : null;
  const counted = text().blocks.filter((block) => block.counts).length;
  byId("count").textContent = `${rows.length} of ${counted} anchors shown`
    + (counted < text().blocks.length ? `; ${text().blocks.length - counted} do not count` : "");
  byId("step").value = state.step;
  byId("step-back").disabled = state.step === 0;
  byId("step-on").disabled = state.step === steps.length - 1;
  showPanel(rows);
  showText(rows);
  showStrip(rows);
  showTable(rows);
  if (reveal) {
    const box = byId("reading"), mark = box.querySelector(".mark.chosen");
    if (mark) box.scrollTop += mark.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  }
}

function goStep(index) {
  if (index < 0 || index >= steps.length) return;
  state.step = index;
  state.text = Math.min(state.text, data.steps[index].texts.length - 1);
  state.block = null;
  byId("text").replaceChildren(...data.steps[index].texts.map((_, row) => make("option", { value: row }, String(row + 1))));
  byId("text").value = state.text;
  byId("text-choice").hidden = data.steps[index].texts.length < 2;
  show({ reveal: true });
}

function goAnchor(by) {
  const rows = summaries();
  const row = rows[rows.findIndex((each) => each.number === state.block) + by];
  if (!row) return;
  state.block = row.number;
  show({ reveal: true });
}

function cycle(id) {
  byId(id).selectedIndex = (byId(id).selectedIndex + 1) % byId(id).options.length;
  resort();
}

// After a change of order or filter the first of the list is the one asked for.
function resort() {
  state.block = null;
  show({ reveal: true });
}

byId("name").textContent = data.name;
byId("step").replaceChildren(...steps.map((step, index) => make("option", { value: index }, String(step))));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("step").addEventListener("change", () => goStep(Number(byId("step").value)));
byId("step-back").addEventListener("click", () => goStep(state.step - 1));
byId("step-on").addEventListener("click", () => goStep(state.step + 1));
byId("text").addEventListener("change", () => { state.text = Number(byId("text").value); resort(); });
for (const id of ["sort", "copies", "least-reward", "least-alignment"]) byId(id).addEventListener("input", resort);
byId("numbers").addEventListener("change", () => show());
byId("back").addEventListener("click", () => goAnchor(-1));
byId("on").addEventListener("click", () => goAnchor(1));
for (const id of ["reading", "strip", "anchors"]) {
  byId(id).addEventListener("click", (event) => {
    const found = event.target.closest("[data-block]");
    if (!found) return;
    state.block = Number(found.dataset.block);
    show({ reveal: id !== "reading" });
    // The panel stands beside the text, or below it where the window is narrow.
    const panel = byId("panel");
    if (id === "anchors") (getComputedStyle(panel).position === "sticky" ? panel.parentElement : panel).scrollIntoView();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const keys = {
    ArrowLeft: () => goAnchor(-1), ArrowRight: () => goAnchor(1), "[": () => goStep(state.step - 1),
    "]": () => goStep(state.step + 1), s: () => cycle("sort"), c: () => cycle("copies"), l: () => byId("numbers").click(),
  };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
goStep(state.step);
