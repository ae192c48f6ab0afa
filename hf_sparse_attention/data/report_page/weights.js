// The picture of all queries (rows) and keys (columns) of a head: exact zeros are left empty, whatever has weight is
// shaded, keys a query cannot see are grey. The row is chosen with the pointer or, as a slider, with the arrow keys.

function weightMap(prompt, part, name, choose) {
  const canvas = element("canvas"), mark = element("div", { className: "mark" });
  const box = element("div", { className: "map", role: "slider", tabIndex: 0, "aria-orientation": "vertical", "aria-label": `${name}: query whose weights are shown` }, canvas, mark);
  const tokens = prompt.tokens.length, block = part.block, cells = Math.ceil(tokens / block);
  box.setAttribute("aria-valuemin", part.queries[0]);
  box.setAttribute("aria-valuemax", part.queries[part.queries.length - 1]);
  let shown = null;

  // The weight that a block's code stands for, at most: the next power of two.
  const at = (row, column) => shown.codes[(row * (row + 1)) / 2 + column];
  const span = (index) => (block === 1 ? `${index}` : `${index * block}\u2013${Math.min(tokens, (index + 1) * block) - 1}`);
  const seen = (row, column) => column <= row &&
    (shown.window === null || (column + 1) * block - 1 > row * block - shown.window);

  function place(event) {
    const frame = canvas.getBoundingClientRect();
    const inside = (value) => Math.min(cells - 1, Math.max(0, Math.floor(value * cells)));
    return [inside((event.clientY - frame.top) / frame.height), inside((event.clientX - frame.left) / frame.width)];
  }
  box.addEventListener("pointermove", (event) => {
    if (!shown || event.pointerType !== "mouse") return;
    const [row, column] = place(event);
    const code = seen(row, column) ? at(row, column) : 0;
    const pair = block === 1 ? `${tokenName(prompt.tokens[row])} (${row}) looks at ${tokenName(prompt.tokens[column])} (${column})`
      : `queries ${span(row)}, keys ${span(column)}`;
    const upper = Math.min(1, 2 ** ((16 * code - 255) / part.steps));
    const says = !seen(row, column) ? "cannot be seen" : code === 0 ? "exactly 0"
      : `${block === 1 ? "weight" : "largest weight"} about ${Number(upper.toPrecision(1))}, within a factor of 2`;
    tip.show(event, `${pair}\n${says}`);
  });
  box.addEventListener("pointerleave", tip.hide);
  box.addEventListener("click", (event) => choose(Math.min(tokens - 1, place(event)[0] * block + block - 1)));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose.by(move);
  });

  function paint() {
    if (!shown) return;
    const side = Math.round(Math.max(1, box.clientWidth) * (window.devicePixelRatio || 1));
    canvas.width = canvas.height = side;
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const edge = (index) => Math.round((index * side) / cells);
    pen.fillStyle = style.getPropertyValue("--card");
    pen.fillRect(0, 0, side, side);
    const shades = Array.from({ length: 17 }, (_, code) => css(mixed("weight", weightLevel(2 ** ((16 * code - 8 - 255) / part.steps)))));
    const outlined = side / cells >= 9;
    pen.strokeStyle = style.getPropertyValue("--outline");
    for (let row = 0; row < cells; row++) {
      const top = edge(row), high = edge(row + 1) - top;
      for (let column = 0; column < cells; column++) {
        const visible = seen(row, column), code = visible ? at(row, column) : 0;
        if (visible && !code) continue;
        const left = edge(column), wide = edge(column + 1) - left;
        pen.fillStyle = visible ? shades[code] : style.getPropertyValue("--unseen");
        pen.fillRect(left, top, wide, high);
        if (visible && outlined) pen.strokeRect(left + 0.5, top + 0.5, wide - 1, high - 1);
      }
    }
  }
  new ResizeObserver(paint).observe(box);

  return {
    box, paint,
    show(decoded, head) {
      shown = { codes: decoded.blocks(head), window: decoded.window };
      paint();
    },
    mark(query, text) {
      const row = Math.floor(query / block);
      mark.style.top = `${(100 * row) / cells}%`;
      mark.style.height = `${100 / cells}%`;
      box.setAttribute("aria-valuenow", query);
      box.setAttribute("aria-valuetext", text);
    },
  };
}
