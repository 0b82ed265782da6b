// In gr.HTML: `element` is the component's, `trigger` tells the page's Python.
element.addEventListener('click', (event) => {
  const target = event.target.closest('[data-pick]');
  if (target && element.contains(target)) trigger('click', { pick: JSON.parse(target.dataset.pick) });
});
// Within a table of colours or a grid of patches the arrow keys lead from cell to cell.
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
element.addEventListener('keydown', (event) => {
  const grid = event.target.closest('[data-across]');
  if (!grid || !STEPS[event.key]) return;
  const cells = [...grid.querySelectorAll('button[data-pick]')];
  const [right, down] = STEPS[event.key];
  const across = Number(grid.dataset.across);
  const place = cells.indexOf(event.target);
  const column = (place % across) + right;
  const next = cells[place + right + down * across];
  if (place < 0 || !next || column < 0 || column >= across) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
