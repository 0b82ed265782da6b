// What is looked at.
const bestLayer = (row) => {
  let best = 0;
  for (let layer = 1; layer < layers; layer++) {
    if (shares[(row * layers + layer) * top] > shares[(row * layers + best) * top]) best = layer;
  }
  return best;
};
const choosePatch = (row) => {
  const layer = bestLayer(row);
  choose({ row, layer }, "picture");
  reveal(row, layer);
};
const choose = (cell, source = "") => {
  current = cell;
  from = source;
  mark();
  figures.forEach(paint);
  describe();
};
const unlock = () => {
  locked = false;
  choose(null);
};
const detail = get("detail"), idle = detail.firstElementChild;
const describe = () => {
  if (!current) return void detail.replaceChildren(idle);
  const { row, layer } = current, place = placeOf[row], at = row * layers + layer;
  const title = make("h2", "", `layer ${data.layers[layer]}, token ${row + 1}`);
  if (locked) {
    const release = make("button", "release", "unlock");
    release.addEventListener("click", unlock);
    title.append(" ", release);
  }
  const where = make("p", "where");
  where.append(`${data.kinds[kind[row]]} `, make("code", "", visible(data.tokens[row])));
  if (place) where.append(` at row ${place.row + 1}, column ${place.col + 1}${many ? " of " + views[place.view].title.split(":")[0] : ""}`);
  if (from === "picture") where.append("; its most confident layer");
  const list = make("ol", "words");
  for (let rank = 0; rank < top; rank++) {
    const value = share(at * top + rank), text = wordOf(at * top + rank), bar = make("i");
    const item = make("li", match[numberOf(at * top + rank)] ? "match" : "");
    const name = make("b", "", visible(text));
    if (/^ ./.test(text) && text.trim()) name.prepend(make("span", "faint", "␣"));
    bar.style.width = value * 100 + "%";
    const track = make("span", "track");
    track.append(bar);
    item.append(name, track, make("span", "number", percent(value)));
    list.append(item);
  }
  const nats = (entropies[at] / 65535) * data.most;
  detail.replaceChildren(title, where, list, make("p", "where", `entropy ${nats.toFixed(2)} nats of at most ${data.most.toFixed(2)}; ${data.hooks[layer]}`));
};

body.addEventListener("mousemove", (event) => {
  if (locked) return;
  const cell = event.target.closest(".cell"), line = event.target.closest(".row");
  if (!cell || !line) return;
  if (!current || current.row !== line.row || current.layer !== cell.layer) choose({ row: line.row, layer: cell.layer });
});
body.addEventListener("mouseleave", () => locked || choose(null));
body.addEventListener("click", (event) => {
  const line = event.target.closest(".row"), cell = event.target.closest(".cell");
  if (!line) return;
  const layer = cell ? cell.layer : bestLayer(line.row);
  const same = current && current.row === line.row && current.layer === layer;
  locked = !(locked && same);
  choose({ row: line.row, layer });
});
grid.addEventListener("scroll", () => render(false), { passive: true });
grid.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(grid.clientHeight / ROW) - 2);
  const steps = {
    ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    PageUp: [-page, 0], PageDown: [page, 0], Home: [0, -layers], End: [0, layers],
  };
  const step = steps[event.key];
  if (event.key === "Escape") return void unlock();
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    locked = !locked && current !== null;
    return void choose(current);
  }
  if (!step) return;
  event.preventDefault();
  // An arrow begins where the table is scrolled to; Control goes to the ends of the table.
  const here = current || { row: Math.ceil(grid.scrollTop / ROW), layer: 0 };
  const [across, down] = [current || layers === Math.abs(step[1]) ? step[1] : 0, current ? step[0] : 0];
  const far = event.ctrlKey && !step[0] ? rows * Math.sign(step[1]) : down;
  choose({ row: clamp(here.row + far, 0, rows - 1), layer: clamp(here.layer + across, 0, layers - 1) });
  reveal(current.row, current.layer);
});

// Search: texts first, then all cells that hold one of them.
const search = get("search"), told = get("hits");
let place = -1;
const tell = () => {
  if (!search.value.trim()) told.textContent = "";
  else if (!hits.length) told.textContent = "no hit";
  else told.textContent = `${place >= 0 ? place + 1 + " of " : ""}${hits.length} hit${hits.length > 1 ? "s" : ""}`;
  get("back").disabled = get("next").disabled = !hits.length;
};
search.addEventListener("input", () => {
  const wanted = search.value.trim().toLowerCase();
  match = Uint8Array.from(data.words, (text) => (wanted && text.toLowerCase().includes(wanted) ? 1 : 0));
  hits = [];
  isHit.fill(0);
  hitRows.fill(0);
  for (let at = 0; wanted && at < rows * layers; at++) {
    for (let rank = at * top; rank < (at + 1) * top; rank++) {
      if (!match[numberOf(rank)]) continue;
      hits.push(at);
      isHit[at] = hitRows[Math.floor(at / layers)] = 1;
      break;
    }
  }
  place = -1;
  tell();
  render(true);
  figures.forEach(layOut);
  describe();
});
const jump = (step) => {
  if (!hits.length) return;
  place = place < 0 ? (step > 0 ? 0 : hits.length - 1) : (place + step + hits.length) % hits.length;
  const at = hits[place];
  locked = true;
  choose({ row: Math.floor(at / layers), layer: at % layers });
  reveal(current.row, current.layer);
  tell();
};
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter") jump(event.shiftKey ? -1 : 1);
  if (event.key === "Escape") search.blur();
});
get("next").addEventListener("click", () => jump(1));
get("back").addEventListener("click", () => jump(-1));
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target === search) return;
  event.preventDefault();
  search.select();
});
get("colour").addEventListener("change", (event) => {
  byEntropy = event.target.value === "entropy";
  render(true);
});
get("scale").style.background = `linear-gradient(to right, ${COLOURS.filter((_, i) => i % 15 === 0).join(",")})`;

// What stands around the table.
const line = (name, text) => {
  get("about").append(make("dt", "", name), make("dd", "", text));
};
if (data.prompt) line("prompt", data.prompt);
if (data.answer !== null) line("answer", data.answer);
data.facts.forEach(([name, text]) => line(name, text));
data.kinds.forEach((name, number) => {
  const count = kind.reduce((sum, value) => sum + (value === number), 0);
  const button = make("button", "kind", `${name} ${count}`);
  button.dataset.kind = name;
  button.title = `to the first ${name} token`;
  button.addEventListener("click", () => (grid.scrollTop = kind.indexOf(number) * ROW));
  get("kinds").append(button);
});
new ResizeObserver(() => {
  fit();
  render(false);
  figures.forEach(layOut);
}).observe(grid);
tell();
fit();
render(true);
