// What the page knows. All data comes from the JSON block; it reaches the page through textContent, title and numbers alone.
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};

// Numbers: base64 of little-endian integers.
const bytes = (text) => {
  const raw = atob(text);
  const found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found;
};
const integers = (text, Kind) => new Kind(bytes(text).buffer);
const low = integers(data.low, Uint16Array);
const high = data.high ? bytes(data.high) : null;
const shares = integers(data.shares, Uint16Array);
const entropies = integers(data.entropy, Uint16Array);
const kind = bytes(data.kind);
const rows = data.tokens.length, layers = data.layers.length, top = data.top;
const numberOf = (at) => low[at] + (high ? high[at] * 65536 : 0);
const wordOf = (at) => data.words[numberOf(at)];
const share = (at) => shares[at] / 65535;
const clamp = (value, least, most) => Math.max(least, Math.min(most, value));

// Text as people can see it.
const MARKS = { "\n": "⏎", "\r": "⏎", "\t": "⇥", "\u00a0": "␣" };
const visible = (text) => {
  const inner = text.trim();
  const kept = inner === "" ? text.replace(/ /g, "␣") : inner;
  if (kept === "") return "∅";
  return kept.replace(/[\u0000-\u001f\u007f\u00a0]/g, (c) => MARKS[c] || "\\x" + c.charCodeAt(0).toString(16));
};
const percent = (value) => {
  if (value >= 0.9995) return "100 %";
  if (value < 0.0001) return "< 0.01 %";
  return (value * 100).toFixed(value < 0.01 ? 2 : 1) + " %";
};

// Colours: light to middle (after ColorBrewer's YlGnBu), in order for every eye, dark text readable on all of them.
const STOPS = [[0, 255, 255, 255], [0.1, 244, 250, 200], [0.35, 199, 233, 180], [0.7, 127, 205, 187], [1, 65, 182, 196]];
const colourAt = (value) => {
  let upper = 1;
  while (STOPS[upper][0] < value) upper++;
  const a = STOPS[upper - 1], b = STOPS[upper], t = (value - a[0]) / (b[0] - a[0]);
  return `rgb(${[1, 2, 3].map((i) => Math.round(a[i] + (b[i] - a[i]) * t)).join(",")})`;
};
const COLOURS = Array.from({ length: 256 }, (_, i) => colourAt(i / 255));
let byEntropy = false;
const strength = (row, layer) => {
  const at = row * layers + layer;
  return byEntropy ? 1 - entropies[at] / 65535 : share(at * top);
};

// Where rows lie in pictures.
const placeOf = new Array(rows).fill(null);
const views = data.views.map((view, number) => {
  const at = integers(view.at, Int32Array);
  at.forEach((row, cell) => {
    if (row >= 0 && !placeOf[row]) {
      placeOf[row] = { view: number, row: Math.floor(cell / view.cols), col: cell % view.cols };
    }
  });
  return { ...view, at };
});
const many = views.filter((view) => view.rows > 0).length > 1;
const label = (row) => {
  const place = placeOf[row];
  if (!place) return visible(data.tokens[row]);
  return `▦ ${many ? place.view + 1 + ": " : ""}${place.row + 1}, ${place.col + 1}`;
};
