// The heat-map of layers and heads, a grid that is walked with the arrow keys.

function headGrid(data, measures, choose) {
  const grid = byId("grid"), columns = Math.max(...data.layers.map((row) => row.zeros.length));
  const large = columns > 16;
  grid.classList.toggle("small", large);
  grid.classList.toggle("few", columns <= 8);
  grid.style.gridTemplateColumns = `2.2rem repeat(${columns}, minmax(0, 1fr))`;
  grid.setAttribute("aria-rowcount", data.layers.length + 1);
  grid.setAttribute("aria-colcount", columns + 1);
  const step = columns > 40 ? 8 : columns > 16 ? 4 : 1;
  const header = element("div", { role: "row" }, element("div", { role: "columnheader", "aria-label": "layer" }));
  for (let head = 0; head < columns; head++) {
    header.append(element("div", { role: "columnheader", textContent: head % step ? "" : String(head) }));
  }
  const cells = data.layers.map((row) => row.zeros.map((_, head) => element("div", { role: "gridcell", tabIndex: -1 }, element("span"))));
  const lines = data.layers.map((row, line) => element("div", { role: "row" },
    element("div", { role: "rowheader", textContent: row.layer, title: `layer ${row.layer}` }), ...cells[line],
    // Layers with fewer heads than others, which some families have.
    ...Array.from({ length: columns - cells[line].length }, () => element("div"))));
  grid.replaceChildren(header, ...lines);

  const describe = (line, head) => {
    const row = data.layers[line];
    return `Layer ${row.layer}, head ${head}\n${share(row.zeros[head])} exact zeros\n` +
      `${count(row.support[head])} of ${count(row.visible)} keys on average\n` +
      `${share(row.block_sparsity[head])} empty tiles\nfactor ${decimal(row.scale[head], 3)}, alpha ${decimal(row.alpha[head], 3)}`;
  };
  const place = (event) => {
    const cell = event.target.closest("[role=gridcell]");
    const line = cells.findIndex((row) => row.includes(cell));
    return line < 0 ? null : [line, cells[line].indexOf(cell)];
  };
  grid.addEventListener("click", (event) => {
    const found = place(event);
    if (found) choose(data.layers[found[0]].layer, found[1]);
  });
  grid.addEventListener("pointermove", (event) => {
    const found = event.pointerType === "mouse" && place(event);
    if (found) tip.show(event, describe(...found));
    else tip.hide();
  });
  grid.addEventListener("pointerleave", tip.hide);
  grid.addEventListener("keydown", (event) => {
    const found = place(event);
    if (!found) return;
    let [line, head] = found;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -head], End: [0, columns] };
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    line = Math.min(cells.length - 1, Math.max(0, line + move[0]));
    head = Math.min(cells[line].length - 1, Math.max(0, head + move[1]));
    choose(data.layers[line].layer, head);
    cells[line][head].focus();
  });

  return {
    colour(name) {
      const measure = measures[name];
      data.layers.forEach((row, line) => row[name].forEach((value, head) => {
        const cell = cells[line][head], zero = measure.zero && value === 0;
        const colour = mixed("sparse", measure.level(value, row));
        cell.classList.toggle("zero", Boolean(zero));
        cell.style.backgroundColor = zero ? "" : css(colour);
        cell.style.color = zero ? "" : inkOn(colour);
        cell.firstChild.textContent = measure.cell(value);
        cell.setAttribute("aria-label", `layer ${row.layer}, head ${head}: ${zero ? measure.zero : measure.text(value)}`);
      }));
      const stops = Array.from({ length: 9 }, (_, index) => css(mixed("sparse", index / 8)));
      const ramp = element("i");
      ramp.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
      const marks = measure.marks.map(([at, text]) => {
        const mark = element("span", { textContent: text, className: at === 1 ? "end" : "" });
        mark.style.left = `${100 * at}%`;
        return mark;
      });
      const zeros = measure.zero && data.layers.some((row) => row[name].includes(0));
      byId("legend").replaceChildren(element("div", { className: "ramp" }, ramp, ...marks),
        ...(zeros ? [element("span", {}, element("span", { className: "swatch zero" }), measure.zero)] : []));
      byId("measure-text").textContent = theme() === "dark" && measure.darkHelp ? measure.darkHelp : measure.help;
    },
    select(layer, head) {
      data.layers.forEach((row, line) => cells[line].forEach((cell, column) => {
        const chosen = row.layer === layer && column === head;
        cell.setAttribute("aria-selected", chosen);
        cell.tabIndex = chosen ? 0 : -1;
      }));
    },
  };
}
