// The streams of encoding.py: per layer varints (support, kept, steps back), then bytes (rests, weights, blocks).

async function bytesOf(stream) {
  const packed = Uint8Array.from(atob(stream), (character) => character.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(unpacked).arrayBuffer());
}

function varints(bytes, amount) {
  const numbers = new Int32Array(amount);
  let at = 0;
  for (let index = 0; index < amount; index++) {
    let value = 0, shift = 0, byte;
    do {
      byte = bytes[at++];
      value |= (byte & 127) << shift;
      shift += 7;
    } while (byte & 128);
    numbers[index] = value;
  }
  return [numbers, at];
}

// Everything of one layer; `row(head, place)` is the query at a place in `queries`.
async function decodeLayer(part, layer) {
  const bytes = await bytesOf(layer.stream);
  const queries = part.queries, rows = layer.heads * queries.length;
  const [numbers, end] = varints(bytes, 2 * rows + layer.entries);
  const support = numbers.subarray(0, rows), kept = numbers.subarray(rows, 2 * rows);
  const found = numbers.subarray(2 * rows);
  const starts = new Int32Array(rows + 1);
  for (let row = 0; row < rows; row++) {
    starts[row + 1] = starts[row] + kept[row];
    let key = queries[row % queries.length];
    for (let entry = starts[row]; entry < starts[row + 1]; entry++) key = found[entry] = key - found[entry];
  }
  if (starts[rows] !== layer.entries) throw new Error("the page's data are not whole");
  const rests = bytes.subarray(end, end + rows);
  const codes = bytes.subarray(end + rows, end + rows + layer.entries);
  const blocks = bytes.subarray(end + rows + layer.entries);
  const weight = (code) => code ? 2 ** ((code - 255) / part.steps) : 0;
  const triangle = blocks.length / layer.heads;
  return {
    window: layer.window,
    blocks: (head) => blocks.subarray(head * triangle, (head + 1) * triangle),
    row(head, place) {
      const row = head * queries.length + place;
      const span = [starts[row], starts[row + 1]];
      return {
        support: support[row], kept: kept[row], rest: weight(rests[row]),
        keys: found.subarray(...span), weights: Array.from(codes.subarray(...span), weight),
      };
    },
  };
}

// The layers of a model, unpacked when they are first looked at; few are held, for a large page has many.
function layersOf(part) {
  const held = new Map();
  return (number) => {
    if (!held.has(number)) {
      if (held.size >= 4) held.delete(held.keys().next().value);
      held.set(number, decodeLayer(part, part.layers.find((layer) => layer.layer === number)));
    }
    return held.get(number);
  };
}
