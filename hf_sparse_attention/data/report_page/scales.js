// Numbers to colours. Sparse is the strong end of one ramp, weight of another; both also rise in lightness alone.

const RAMPS = {
  light: { sparse: ["#f1ede2", "#bfdcd3", "#68b3b1", "#1f7f93", "#0a4668"], weight: ["#fbe3cb", "#f5a55c", "#d95f1a", "#7d2500"] },
  dark: { sparse: ["#2a3136", "#1f4f5a", "#1c8088", "#48bca8", "#dcf7b4"], weight: ["#4a3524", "#95531f", "#e8842f", "#ffe0b0"] },
};
const theme = () => document.documentElement.dataset.theme;

function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

// A level from 0 to 1 on a ramp, as [red, green, blue].
function mixed(kind, level) {
  const stops = RAMPS[theme()][kind].map(channels), place = Math.min(1, Math.max(0, level)) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2), part = place - below;
  return stops[below].map((value, index) => Math.round(value + part * (stops[below + 1][index] - value)));
}
const css = (parts) => `rgb(${parts.join(",")})`;

// Black or white, whichever stands out more from a colour by WCAG's contrast.
function inkOn(parts) {
  const linear = parts.map((value) => (value / 255 <= 0.04045 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return (light + 0.05) ** 2 > 0.0525 ? "#000000" : "#ffffff";
}

// A weight's level: its logarithm down to 2^-12; whatever is not exactly 0 stays visible.
const weightLevel = (weight) => Math.max(0, 1 + Math.log2(weight) / 12);

// What the colours of the heads can show: the level of a number, its text, and the ends of the legend.
function measuresOf(data) {
  const all = (name) => data.layers.flatMap((row) => row[name]);
  const between = (name) => {
    const low = Math.min(...all(name)), high = Math.max(...all(name));
    return { low, high, level: (value) => (high - low > 1e-9 ? (value - low) / (high - low) : 0.5) };
  };
  const linear = (name, digits) => {
    const { low, high, level } = between(name);
    const marks = high - low > 1e-9 ? [[0, decimal(low, digits)], [1, decimal(high, digits)]] : [[0.5, decimal(low, digits)]];
    return { level, marks, text: (value) => decimal(value, digits), cell: (value) => decimal(value, 2) };
  };
  // Shares of zeros crowd near 100 %: equal steps of colour are tenfold fewer keys with weight.
  const few = (used) => Math.min(1, -Math.log10(Math.max(used, 1e-9)) / 3);
  const visible = Math.max(...data.layers.map((row) => row.visible));
  return {
    zeros: {
      name: "Exact zeros", level: (value) => few(1 - value), text: (value) => `${share(value)} exact zeros`,
      cell: (value) => share(value, 0).replace(" %", ""), zero: "no zeros: softmax",
      marks: [[0, "0 %"], [1 / 3, "90 %"], [2 / 3, "99 %"], [1, "99.9 %"]],
      help: "Percent of the keys a query sees whose weight is exactly zero. The darker, the sparser.",
      darkHelp: "Percent of the keys a query sees whose weight is exactly zero. The brighter, the sparser.",
    },
    support: {
      name: "Keys used", level: (value, row) => 1 - Math.log(Math.max(1, value)) / Math.log(Math.max(2, row.visible)),
      text: (value) => `${count(value)} keys on average`, cell: (value) => count(value < 10 ? value : Math.round(value)),
      marks: [[0, `all ${count(visible)}`], [0.5, count(Math.sqrt(visible))], [1, "1"]],
      help: "Keys that carry weight, mean over queries.",
    },
    block_sparsity: {
      name: "Empty tiles", level: (value) => value, text: (value) => `${share(value)} empty tiles`,
      cell: (value) => share(value, 0).replace(" %", ""), marks: [[0, "0 %"], [0.5, "50 %"], [1, "100 %"]], zero: "no tile is empty",
      help: `Percent of the ${data.tile} \u00d7 ${data.tile} tiles of queries and keys without any weight: what a kernel can skip.`,
    },
    scale: { name: "Factor", help: "The map's factor on the query, mean over queries. Above 1 is sharper, below 1 is flatter.", ...linear("scale", 3) },
    alpha: { name: "Alpha", help: "Alpha of entmax: 1 is softmax, larger is sparser.", ...linear("alpha", 3) },
  };
}
