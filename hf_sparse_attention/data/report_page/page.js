// What is chosen, and what follows from it. The address keeps the choice: #layer=1&head=3&query=20&measure=zeros.

const data = JSON.parse(byId("data").textContent);
const prompt = data.prompt, measures = measuresOf(data), queries = prompt.sparse.queries;
const layerOf = (number) => data.layers.find((row) => row.layer === number);
const heads = data.layers.flatMap((row) => row.zeros.map((zeros, head) => ({ layer: row.layer, head, zeros, used: row.support[head] })));
const sparsest = heads.reduce((best, one) => (one.zeros > best.zeros ? one : best));
const densest = heads.reduce((best, one) => (one.zeros < best.zeros ? one : best));
const state = { measure: "zeros", layer: sparsest.layer, head: sparsest.head, query: queries[queries.length - 1] };
const asked = new URLSearchParams(location.hash.slice(1));

// The theme: the system's, until the button says otherwise.
const dark = matchMedia("(prefers-color-scheme: dark)");
let themeChosen = ["light", "dark"].includes(asked.get("theme"));
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", name === "dark" ? "Use light colours" : "Use dark colours");
}
setTheme(themeChosen ? asked.get("theme") : dark.matches ? "dark" : "light");

function remember() {
  const kept = { ...state, ...(themeChosen ? { theme: theme() } : {}) };
  // A frame made from a string, as in a notebook, has no address to keep it in.
  try { history.replaceState(null, "", `#${new URLSearchParams(kept)}`); } catch { /* nothing depends on it */ }
}

// The stored query nearest to a token.
const nearest = (token) => queries.reduce((best, query) => (Math.abs(query - token) < Math.abs(best - token) ? query : best));
const chooseQuery = (token) => set({ query: nearest(token) });
chooseQuery.by = (steps) => {
  const place = Math.min(queries.length - 1, Math.max(0, queries.indexOf(state.query) + steps));
  set({ query: queries[place] });
};
const chooseHead = (layer, head) => set({ layer, head });

const grid = headGrid(data, measures, chooseHead);
const views = [["sparse", data.map], ...(prompt.dense ? [["dense", "dense, softmax"]] : [])].map(([kind, name]) => {
  const part = prompt[kind], map = weightMap(prompt, part, name, chooseQuery), strip = tokenStrip(prompt, part, name, chooseQuery);
  const text = element("p", { className: "count" });
  const view = element("div", { className: "view" },
    element("h3", { textContent: kind === "sparse" ? `${data.model}: ${data.map}` : `${data.dense}: softmax` }), map.box, text, strip.strip);
  return { kind, part, map, strip, text, view, layer: layersOf(part) };
});
byId("views").replaceChildren(...views.map(({ view }) => view));

function header() {
  const mean = data.mean, zeros = mean.zeros;
  byId("title").textContent = `Where ${data.model} looks`;
  byId("summary").replaceChildren(...(zeros > 0
    ? [element("strong", { textContent: share(zeros) }), ` of the attention weights are exactly zero: of ${count(mean.visible)} keys a query sees, it uses ${count(mean.support)} on average.`]
    : ["No attention weight is exactly zero: every visible key carries weight, as with softmax."]));
  const jump = (text, place) => element("li", {}, `${text}: `, element("button", {
    type: "button", className: "link", textContent: `layer ${place.layer}, head ${place.head}`, onclick: () => chooseHead(place.layer, place.head),
  }), ` (${share(place.zeros)} zeros, ${keys(place.used)})`);
  const alphas = data.layers.flatMap((row) => row.alpha), low = Math.min(...alphas), high = Math.max(...alphas);
  byId("facts").replaceChildren(
    ...(zeros > 0 ? [jump("Sparsest", sparsest), jump("Least sparse", densest)] : []),
    element("li", { textContent: `${data.map}, alpha ${high - low > 1e-6 ? `${decimal(low, 3)} to ${decimal(high, 3)} by head` : Number(low.toFixed(4))}, position ${data.position}` }),
    element("li", { textContent: `${data.layers.length} sparse layers, ${heads.length} heads; ${data.windows} ${data.windows === 1 ? "window" : "windows"} of ${whole(data.length)} tokens` }));
  const every = queries.length === prompt.tokens.length;
  byId("prompt-text").textContent = (prompt.total > prompt.tokens.length
    ? `The first ${whole(prompt.tokens.length)} of the prompt's ${whole(prompt.total)} tokens. ` : `${whole(prompt.tokens.length)} tokens. `) +
    (every ? "Choose a query in the picture or the text." : `Weights are kept of ${whole(queries.length)} of the ${whole(prompt.tokens.length)} queries; the picture is of all.`) +
    (prompt.sparse.block > 1 ? ` A point of the picture is ${prompt.sparse.block} \u00d7 ${prompt.sparse.block} tokens; it is empty where every weight is exactly 0.` : "");
  byId("footer").textContent = `hf_sparse_attention ${data.versions.hf_sparse_attention}, Transformers ${data.versions.transformers}, PyTorch ${data.versions.torch}. ` +
    `Weights of the prompt are rounded to within ${share(data.precision)} of themselves; those below ${data.smallest.toPrecision(1)} are shown as that, and never as 0. Zeros are exact.`;
}

function controls() {
  byId("measures").replaceChildren(...Object.entries(measures).map(([name, measure]) => element("button", {
    type: "button", role: "radio", textContent: measure.name, onclick: () => set({ measure: name }), value: name,
  })));
  byId("measures").addEventListener("keydown", (event) => {
    const names = Object.keys(measures), move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    set({ measure: names[(names.indexOf(state.measure) + move + names.length) % names.length] });
    byId("measures").querySelector("[aria-checked=true]").focus();
  });
  byId("layer").replaceChildren(...data.layers.map((row) => element("option", { value: row.layer, textContent: row.layer })));
  byId("layer").addEventListener("change", (event) => set({ layer: Number(event.target.value) }));
  byId("head").addEventListener("change", (event) => set({ head: Number(event.target.value) }));
  const query = byId("query");
  query.min = queries[0];
  query.max = queries[queries.length - 1];
  if (queries.length > 1) query.step = queries[1] - queries[0];
  query.addEventListener("change", () => chooseQuery(Number(query.value) || 0));
  byId("previous").addEventListener("click", () => chooseQuery.by(-1));
  byId("next").addEventListener("click", () => chooseQuery.by(1));
  byId("theme").addEventListener("click", () => {
    themeChosen = true;
    setTheme(theme() === "dark" ? "light" : "dark");
    recolour();
  });
  dark.addEventListener("change", () => {
    if (themeChosen) return;
    setTheme(dark.matches ? "dark" : "light");
    recolour();
  });
  const swatch = (background, border) => {
    const made = element("span", { className: "swatch" });
    made.style.background = background;
    if (border) made.style.borderColor = border;
    return made;
  };
  const gradient = "linear-gradient(90deg, var(--from), var(--to))";
  const entry = (mark, text) => element("span", {}, mark, `${text}  `);
  byId("weights-key").replaceChildren(entry(swatch(gradient, "var(--outline)"), "carries weight, light to heavy"),
    entry(swatch("var(--card)"), "exactly 0"), entry(swatch("var(--unseen)"), "cannot be seen"),
    ...(prompt.dense ? [entry(swatch("var(--rest)"), "small weight, kept only as a sum")] : []));
}

// A weight for a tooltip or the table.
function weightText(row, key, isSeen) {
  const place = row.keys.indexOf(key);
  if (place >= 0) {
    const weight = row.weights[place];
    return weight <= data.smallest ? `< ${data.smallest.toPrecision(1)}` : Number(weight.toPrecision(2)).toString();
  }
  if (isSeen && !isSeen(key)) return "cannot be seen";
  // A softmax weight that a float rounds to 0 is none of the map's zeros.
  if (row.kept === row.support) return "exactly 0";
  return row.rest > 0 ? "small, not kept" : "rounds to 0";
}

function countText(row, query, window) {
  const visible = window === null ? query + 1 : Math.min(window, query + 1), zeros = visible - row.support;
  const kept = row.kept < row.support && row.rest > 0 ? ` The ${whole(row.kept)} heaviest are drawn; the others hold ${share(row.rest)} of the weight.` : "";
  return `${keys(row.support)} of ${whole(visible)} ${row.support === 1 ? "carries" : "carry"} weight, ${zeros ? `${whole(zeros)} exactly zero` : "none is exactly zero"}.${kept}`;
}

// Only the newest choice is shown, however long an older one takes to unpack.
let newest = 0;
async function showPrompt() {
  const mine = ++newest, { layer, head, query } = state;
  const decoded = await Promise.all(views.map((view) => view.layer(layer)));
  if (mine !== newest) return;
  const place = queries.indexOf(query), rows = decoded.map((part) => part.row(head, place));
  views.forEach((view, index) => {
    const { window } = decoded[index], row = rows[index];
    const isSeen = (key) => key <= query && (window === null || key > query - window);
    const text = countText(row, query, window);
    view.text.textContent = text;
    view.map.show(decoded[index], head);
    view.map.mark(query, `token ${query}, ${tokenName(prompt.tokens[query])}: ${text}`);
    view.strip.show(query, row, (key) => weightText(row, key, isSeen), isSeen);
  });
  byId("query-text").textContent = `Layer ${layer}, head ${head}: token ${query}, \u201c${tokenName(prompt.tokens[query])}\u201d, looks at ${keys(rows[0].support)}` +
    (rows[1] ? `; the dense model at all ${whole(rows[1].support)}.` : ".");
  weightTable(prompt, query, rows[0], rows[1], weightText);
  byId("main").dataset.shown = `${layer}:${head}:${query}`;
}

function showHead() {
  const row = layerOf(state.layer), head = state.head;
  grid.select(state.layer, head);
  byId("head-title").textContent = `Layer ${state.layer}, head ${head}`;
  byId("head-text").textContent = `${share(row.zeros[head])} exact zeros: ${keys(row.support[head])} of ${count(row.visible)} carry weight on average. ` +
    `${share(row.block_sparsity[head])} of the ${data.tile} \u00d7 ${data.tile} tiles are empty. Factor ${decimal(row.scale[head], 3)}, alpha ${decimal(row.alpha[head], 3)}.`;
  positionCurve(byId("support-curve"), row, head, "support", { logarithmic: true, visible: true, label: (value) => keys(value) });
  positionCurve(byId("scale-curve"), row, head, "scale", { label: (value) => `factor ${decimal(value, 3)}` });
}

function showMeasure() {
  for (const button of byId("measures").children) {
    const chosen = button.value === state.measure;
    button.setAttribute("aria-checked", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  grid.colour(state.measure);
}

function recolour() {
  const style = document.documentElement.style;
  style.setProperty("--from", css(mixed("weight", 0)));
  style.setProperty("--to", css(mixed("weight", 1)));
  showMeasure();
  showPrompt();
  remember();
}

function set(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  const row = layerOf(state.layer);
  state.head = Math.min(state.head, row.zeros.length - 1);
  if (state.layer !== before.layer || byId("head").options.length !== row.zeros.length) {
    byId("head").replaceChildren(...row.zeros.map((_, head) => element("option", { value: head, textContent: head })));
  }
  byId("layer").value = state.layer;
  byId("head").value = state.head;
  byId("query").value = state.query;
  if (state.measure !== before.measure) showMeasure();
  if (state.layer !== before.layer || state.head !== before.head) showHead();
  showPrompt();
  remember();
}

function fromAddress() {
  const number = (name) => (/^\d+$/.test(asked.get(name) ?? "") ? Number(asked.get(name)) : null);
  if (Object.hasOwn(measures, asked.get("measure"))) state.measure = asked.get("measure");
  const row = layerOf(number("layer") ?? state.layer);
  if (row) state.layer = row.layer;
  const head = number("head");
  if (head !== null && head < layerOf(state.layer).zeros.length) state.head = head;
  if (number("query") !== null) state.query = nearest(number("query"));
}

function fail(error) {
  const note = element("p", { className: "note", role: "alert" });
  note.textContent = `The page cannot be drawn: ${error.message}. ` +
    (typeof DecompressionStream === "undefined" ? "This browser is too old to unpack its data." : "");
  document.body.prepend(note);
}
addEventListener("unhandledrejection", (event) => fail(event.reason));

try {
  byId("main").hidden = false;
  fromAddress();
  header();
  controls();
  set({});
  showHead();
  recolour();
} catch (error) {
  fail(error);
  throw error;
}
