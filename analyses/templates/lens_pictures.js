// Pictures: drawn once with grid and hits, then again with a patch outlined.
const NARROW = window.matchMedia("(max-width: 860px)");
const figures = views.map((view, number) => {
  const figure = make("figure"), canvas = make("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", view.title);
  if (view.rows) canvas.tabIndex = 0;
  figure.append(canvas, make("figcaption", "", view.rows && many ? `${number + 1}: ${view.title}` : view.title));
  get("views").append(figure);
  const image = new Image();
  const made = { view, canvas, image, base: document.createElement("canvas") };
  image.onload = () => layOut(made);
  image.src = data.pictures[view.picture];
  if (view.rows) listen(made, number);
  return made;
});
function layOut(made) {
  const { view, canvas, image, base } = made;
  if (!image.naturalWidth) return;
  const [width, height] = data.sizes[view.picture], [l, t, r, b] = view.box;
  const frame = [Math.min(0, l), Math.min(0, t), Math.max(1, r), Math.max(1, b)];
  const wide = (frame[2] - frame[0]) * width, high = (frame[3] - frame[1]) * height;
  const room = Math.max(120, get("views").clientWidth / (views.length > 3 ? 2.1 : 1));
  const tallest = window.innerHeight * (views.length > 1 ? 0.26 : NARROW.matches ? 0.3 : 0.42);
  const scale = Math.min(room / wide, tallest / high), dots = window.devicePixelRatio || 1;
  canvas.style.width = wide * scale + "px";
  canvas.style.height = high * scale + "px";
  canvas.width = base.width = Math.round(wide * scale * dots);
  canvas.height = base.height = Math.round(high * scale * dots);
  const place = (x, y) => [((x - frame[0]) / (frame[2] - frame[0])) * base.width, ((y - frame[1]) / (frame[3] - frame[1])) * base.height];
  made.patch = (row, col) => {
    const [x, y] = place(l + ((r - l) * col) / view.cols, t + ((b - t) * row) / view.rows);
    const [right, bottom] = place(l + ((r - l) * (col + 1)) / view.cols, t + ((b - t) * (row + 1)) / view.rows);
    return [x, y, right - x, bottom - y];
  };
  made.find = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = frame[0] + ((event.clientX - box.left) / box.width) * (frame[2] - frame[0]);
    const y = frame[1] + ((event.clientY - box.top) / box.height) * (frame[3] - frame[1]);
    const col = Math.floor(((x - l) / (r - l)) * view.cols), row = Math.floor(((y - t) / (b - t)) * view.rows);
    return row < 0 || col < 0 || row >= view.rows || col >= view.cols ? -1 : view.at[row * view.cols + col];
  };
  const pen = base.getContext("2d");
  pen.fillStyle = "#d8d8d8";
  pen.fillRect(0, 0, base.width, base.height);
  pen.imageSmoothingEnabled = Math.max(image.naturalWidth, image.naturalHeight) > 128;
  const [x, y] = place(0, 0), [right, bottom] = place(1, 1);
  pen.drawImage(image, x, y, right - x, bottom - y);
  if (view.rows) drawGrid(made, pen, dots);
  paint(made);
}
function drawGrid({ view, patch }, pen, dots) {
  const side = patch(0, 0)[2] / dots;
  pen.lineWidth = 1;
  pen.strokeStyle = `rgba(255,255,255,${Math.min(0.55, side / 24)})`;
  for (let row = 0; row < view.rows; row++) {
    for (let col = 0; col < view.cols; col++) {
      const row0 = view.at[row * view.cols + col], box = patch(row, col);
      pen.strokeRect(...box);
      if (row0 < 0) {
        pen.fillStyle = "rgba(90,90,90,.5)";
        pen.fillRect(...box);
      } else if (hitRows[row0]) {
        pen.fillStyle = "rgba(230,97,1,.42)";
        pen.fillRect(...box);
      }
    }
  }
}
function paint({ view, canvas, base, patch }) {
  const pen = canvas.getContext("2d"), place = current && placeOf[current.row];
  pen.drawImage(base, 0, 0);
  if (!place || views[place.view] !== view || !patch) return;
  const dots = window.devicePixelRatio || 1, [x, y, wide, high] = patch(place.row, place.col);
  const more = Math.max(0, 5 * dots - wide / 2);
  for (const [colour, line] of [["#000", 5], ["#ffdd00", 2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line * dots;
    pen.strokeRect(x - more, y - more, wide + 2 * more, high + 2 * more);
  }
}
function listen(made, number) {
  const canvas = made.canvas;
  canvas.addEventListener("mousemove", (event) => {
    if (locked || !made.find) return;
    const row = made.find(event);
    if (row < 0) choose(null);
    else if (!current || current.row !== row || from !== "picture") choosePatch(row);
  });
  canvas.addEventListener("mouseleave", () => locked || choose(null));
  canvas.addEventListener("click", (event) => {
    const row = made.find ? made.find(event) : -1;
    if (row < 0) return;
    locked = !(locked && current && current.row === row);
    choosePatch(row);
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }, step = moves[event.key];
    if (event.key === "Escape") return void unlock();
    if (event.key === "Enter" || event.key === " ") locked = !locked && current !== null;
    else if (!step) return;
    event.preventDefault();
    const place = current && placeOf[current.row], here = place && place.view === number ? place : { row: 0, col: 0 };
    const { rows: high, cols: wide, at } = made.view, [down, right] = step || [0, 0];
    const row = at[clamp(here.row + down, 0, high - 1) * wide + clamp(here.col + right, 0, wide - 1)];
    if (row >= 0) choosePatch(row);
  });
}
