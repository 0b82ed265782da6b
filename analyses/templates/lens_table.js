// The table: only rows in sight exist.
const grid = get("grid"), head = get("head"), body = get("body");
const ROW = 24, NARROWEST = 78, WIDEST = 128;
let wide = NARROWEST;
grid.setAttribute("aria-rowcount", rows + 1);
grid.setAttribute("aria-colcount", layers + 1);
body.style.height = rows * ROW + "px";
const corner = make("div", "lead", "token ↓  layer →");
corner.setAttribute("role", "columnheader");
head.append(corner);
const heads = data.layers.map((layer, number) => {
  const element = make("div", "cell", String(layer));
  element.title = data.hooks[number];
  element.setAttribute("role", "columnheader");
  head.append(element);
  return element;
});
let pool = [];
let match = new Uint8Array(data.words.length), hits = [], isHit = new Uint8Array(rows * layers), hitRows = new Uint8Array(rows);
let current = null, locked = false, from = "";

const newRow = () => {
  const element = make("div", "row"), lead = make("div", "lead");
  element.setAttribute("role", "row");
  lead.setAttribute("role", "rowheader");
  element.append(lead);
  const cells = data.layers.map((_, layer) => {
    const cell = make("div", "cell");
    cell.setAttribute("role", "gridcell");
    cell.layer = layer;
    element.append(cell);
    return cell;
  });
  body.append(element);
  return { element, lead, cells, row: -1 };
};
const fill = (line, row) => {
  line.row = row;
  line.element.row = row;
  line.element.style.transform = `translateY(${row * ROW}px)`;
  line.element.setAttribute("aria-rowindex", row + 2);
  line.lead.textContent = `${row + 1}  ${label(row)}`;
  line.lead.title = visible(data.tokens[row]);
  line.lead.dataset.kind = data.kinds[kind[row]];
  line.cells.forEach((cell, layer) => {
    const at = row * layers + layer;
    cell.id = `c${row}-${layer}`;
    cell.textContent = visible(wordOf(at * top));
    cell.style.backgroundColor = COLOURS[Math.round(strength(row, layer) * 255)];
    cell.classList.toggle("hit", isHit[at] === 1);
  });
};
const mark = () => {
  for (const line of pool) {
    const on = current !== null && line.row === current.row;
    line.element.classList.toggle("on", on);
    line.cells.forEach((cell, layer) => {
      const here = on && layer === current.layer;
      cell.classList.toggle("on", here);
      cell.classList.toggle("locked", here && locked);
    });
  }
  heads.forEach((element, layer) => element.classList.toggle("on", current !== null && layer === current.layer));
  if (current) grid.setAttribute("aria-activedescendant", `c${current.row}-${current.layer}`);
  else grid.removeAttribute("aria-activedescendant");
};
const fit = () => {
  wide = clamp(Math.floor((grid.clientWidth - corner.offsetWidth) / layers), NARROWEST, WIDEST);
  grid.style.setProperty("--wide", wide + "px");
  body.style.width = head.style.width = corner.offsetWidth + layers * wide + "px";
};
const render = (again) => {
  const size = Math.min(rows, Math.ceil(grid.clientHeight / ROW) + 8);
  while (pool.length < size) {
    pool.push(newRow());
    again = true;
  }
  const first = clamp(Math.floor(grid.scrollTop / ROW) - 4, 0, Math.max(0, rows - pool.length));
  for (let row = first; row < Math.min(rows, first + pool.length); row++) {
    const line = pool[row % pool.length];
    if (again || line.row !== row) fill(line, row);
  }
  mark();
};
const reveal = (row, layer) => {
  const y = row * ROW, bottom = grid.clientHeight - head.offsetHeight - ROW;
  if (y < grid.scrollTop || y > grid.scrollTop + bottom) grid.scrollTop = y - bottom / 2;
  if (layer === undefined) return;
  const x = layer * wide, right = grid.clientWidth - corner.offsetWidth - wide;
  if (x < grid.scrollLeft || x > grid.scrollLeft + right) grid.scrollLeft = x - right / 2;
};
