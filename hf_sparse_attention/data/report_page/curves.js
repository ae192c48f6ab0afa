// Support and factor of a head by position: the chosen head, the others of its layer, and what softmax would use.

const CHART = { width: 420, height: 230, left: 44, right: 12, top: 10, bottom: 34 };

function positionCurve(box, row, head, name, options) {
  const ranges = row.positions, chart = CHART;
  const middle = ranges.map((range) => Math.sqrt(range.start * (range.end - 1)));
  const last = Math.max(2, middle[middle.length - 1]);
  const across = (value) => chart.left + (chart.width - chart.left - chart.right) * Math.log2(Math.max(1, value)) / Math.log2(last);
  const series = row[name].map((_, index) => ranges.map((range) => range[name][index]));
  const visible = options.visible ? ranges.map((range) => range.visible) : null;
  const values = series.flat().concat(visible || []);
  const bend = options.logarithmic ? Math.log2 : (value) => value;
  let low = bend(Math.min(...values)), high = bend(Math.max(...values));
  if (options.logarithmic) low = Math.min(0, low);
  else { const room = Math.max(0.05 * (high - low), 0.02 * Math.abs(high), 1e-3); low -= room; high += room; }
  if (high - low < 1e-9) high = low + 1;
  const up = (value) => chart.height - chart.bottom - (chart.height - chart.top - chart.bottom) * (bend(value) - low) / (high - low);
  const path = (numbers) => numbers.map((value, index) => `${index ? "L" : "M"}${across(middle[index]).toFixed(1)},${up(value).toFixed(1)}`).join("");

  const marks = [];
  const label = (x, y, text, anchor) => drawn("text", { x, y, "text-anchor": anchor }, text);
  for (let power = 0, step = Math.max(1, Math.ceil(Math.log2(last) / 7)); 2 ** power <= last * 1.01; power += step) {
    const x = across(2 ** power);
    marks.push(drawn("line", { class: "tick", x1: x, x2: x, y1: chart.top, y2: chart.height - chart.bottom }));
    marks.push(label(x, chart.height - chart.bottom + 14, whole(2 ** power), "middle"));
  }
  const heights = options.logarithmic
    ? Array.from({ length: Math.floor(high) + 1 }, (_, power) => 2 ** power).filter((_, power) => power % Math.max(1, Math.ceil(high / 6)) === 0)
    : Array.from({ length: 5 }, (_, index) => low + (index / 4) * (high - low));
  for (const value of heights) {
    const y = up(value);
    marks.push(drawn("line", { class: "tick", x1: chart.left, x2: chart.width - chart.right, y1: y, y2: y }));
    marks.push(label(chart.left - 6, y + 4, options.logarithmic ? whole(value) : decimal(value, 2), "end"));
  }
  marks.push(label((chart.left + chart.width) / 2, chart.height - 4, "position of the query in its window", "middle"));
  const others = series.map((numbers, index) => (index === head ? null : drawn("path", { class: "other", d: path(numbers) }))).filter(Boolean);
  const dot = drawn("circle", { r: 5, visibility: "hidden" });
  const text = (index) => `${options.label(series[head][index])}\n` + (ranges[index].end - ranges[index].start === 1
    ? `position ${whole(ranges[index].start)}` : `positions ${whole(ranges[index].start)} to ${whole(ranges[index].end - 1)}`) +
    (visible ? `\n${count(visible[index])} keys visible` : "");
  const end = series[head].length - 1;
  const svg = drawn("svg", {
    viewBox: `0 0 ${chart.width} ${chart.height}`, role: "img",
    "aria-label": `${options.label(series[head][0])} at the first position, ${options.label(series[head][end])} at the last ones`,
  }, ...marks, ...others, ...(visible ? [drawn("path", { class: "all", d: path(visible) })] : []),
  drawn("path", { class: "chosen", d: path(series[head]) }), dot);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), x = (event.clientX - frame.left) / frame.width * chart.width;
    const nearest = middle.reduce((best, value, index) => Math.abs(across(value) - x) < Math.abs(across(middle[best]) - x) ? index : best, 0);
    dot.setAttribute("cx", across(middle[nearest]));
    dot.setAttribute("cy", up(series[head][nearest]));
    dot.setAttribute("visibility", "visible");
    tip.show(event, text(nearest));
  });
  svg.addEventListener("pointerleave", () => { dot.setAttribute("visibility", "hidden"); tip.hide(); });
  box.replaceChildren(svg);
}
