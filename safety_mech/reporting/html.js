// The grid's value line: what the pointer, a tap or the arrow keys are on. Without it the cells still carry <title>.
for (const grid of document.querySelectorAll(".grid")) {
  const readout = grid.querySelector("output");
  const cells = [...grid.querySelectorAll(".cell")];
  const at = new Map(cells.map((cell) => [cell.dataset.at, cell]));
  const show = (cell) => { readout.textContent = cell.querySelector("title").textContent; };
  const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
  for (const cell of cells) {
    cell.addEventListener("pointerover", () => show(cell));
    cell.addEventListener("focus", () => show(cell));
    cell.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      const [start, end] = cell.dataset.at.split("-").map(Number);
      const next = at.get(`${start + step[0]}-${end + step[1]}`);
      if (!next) return;
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
}
