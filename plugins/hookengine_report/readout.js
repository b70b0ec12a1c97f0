"use strict";
// The values below the pointer. The page is complete without.
const ends = (document.querySelector("main").dataset.epochs || "").split(" ").filter(Boolean).map(Number);
const shown = (value) => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(value);

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}

for (const plot of document.querySelectorAll(".plot[data-end]")) {
  const end = Number(plot.dataset.end);
  let lines = null;
  const read = () => [...plot.querySelectorAll(".line")].map((path) => ({
    path,
    name: path.dataset.name,
    x: path.dataset.x.split(" ").filter(Boolean).map(Number),
    y: path.dataset.y.split(" ").filter(Boolean).map(Number),
  })).filter((line) => line.x.length);
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  const box = document.createElement("div");
  box.className = "readout";
  const hide = () => { cursor.remove(); box.remove(); };

  plot.addEventListener("pointermove", (event) => {
    lines ??= read();
    if (!lines.length) return;
    const area = plot.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width * end;
    const found = lines.map((line) => ({ line, at: nearest(line.x, x) }));
    const distance = ({ line, at }) => Math.abs(line.x[at] - x);
    const closest = found.reduce((a, b) => distance(b) < distance(a) ? b : a);
    const iteration = closest.line.x[closest.at];
    const epoch = ends.findIndex((last) => last >= iteration) + 1;
    const head = document.createElement("b");
    head.textContent = `iteration ${Math.round(iteration)}` + (epoch ? `, epoch ${epoch}` : "");
    box.replaceChildren(head);
    for (const { line, at } of found) {
      const row = document.createElement("div"), name = document.createElement("span");
      const colour = document.createElement("i"), value = document.createElement("span");
      colour.style.color = getComputedStyle(line.path).color;
      const away = line.x[at] === iteration ? "" : ` (at ${Math.round(line.x[at])})`;
      name.append(colour, line.name + away);
      value.textContent = shown(line.y[at]);
      row.append(name, value);
      box.append(row);
    }
    const left = iteration / end;
    cursor.style.left = `${100 * left}%`;
    box.style.left = left < 0.5 ? `calc(${100 * left}% + 10px)` : "";
    box.style.right = left < 0.5 ? "" : `calc(${100 * (1 - left)}% + 10px)`;
    plot.append(cursor, box);
  });
  plot.addEventListener("pointerleave", hide);
}
