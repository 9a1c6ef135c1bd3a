// Draws boxes and edges as SVG. A box is {kind, name, note, args, label, tint, classes, key}; `key` finds it again.
// One with `parts`, which are boxes, shows those in rows.

const BOX_HEIGHT = 28;
const MARGIN = 8;
const NOTE_LENGTH = 16;
const SMALLEST = 0.72; // beyond this drawings scroll instead of shrinking
const TINTS = 6;
const BLOCK_WIDTH = 380;
const PACKED = 7;

const clipped = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

// Widths of the monospaced letters at 12 and 11 pixels; measuring every text would lay the page out again and again.
function sized(box) {
  if (box.parts) return packed(box);
  const note = clipped(box.note || "", NOTE_LENGTH);
  const letters = box.name.length * 7.3 + (note ? note.length * 6.7 + 7 : 0);
  return { ...box, note, width: Math.max(44, letters + 20), height: box.height || BOX_HEIGHT };
}

// Several boxes that the same box reads, or makes, in rows: one box for the layout. Places are from its centre.
function packed(box) {
  const rows = [[]];
  let x = 0;
  for (const part of box.parts.map(sized)) {
    if (x && x + part.width > BLOCK_WIDTH) {
      rows.push([]);
      x = 0;
    }
    rows[rows.length - 1].push(part);
    x += part.width + PACKED;
  }
  const widths = rows.map((row) => row.reduce((sum, part) => sum + part.width + PACKED, -PACKED));
  const height = rows.length * (BOX_HEIGHT + PACKED) + PACKED;
  rows.forEach((row, r) => {
    let left = -widths[r] / 2;
    for (const part of row) {
      part.x = left + part.width / 2;
      part.y = (r + 0.5) * (BOX_HEIGHT + PACKED) - height / 2 + PACKED / 2;
      part.row = r;
      left += part.width + PACKED;
    }
  });
  return { ...box, parts: rows.flat(), width: Math.max(...widths) + 2 * PACKED, height };
}

function draw(boxes, title, onSelect) {
  const shown = boxes.map(sized);
  const plan = layered(shown);
  const [width, height] = [plan.width + 2 * MARGIN, plan.height + 2 * MARGIN];
  const root = svg("svg", {
    viewBox: `${-MARGIN} ${-MARGIN} ${width} ${height}`, width, height, role: "group", "aria-label": title,
    style: `min-width:${Math.round(width * SMALLEST)}px`, class: "graph",
  });
  const lines = plan.edges.map((edge) => line(edge, shown));
  const frames = shown.map((box, i) => (box.parts ? frame(box, plan.nodes[i]) : null));
  root.append(svg("g", { "aria-hidden": "true" }, frames, lines));
  const items = shown.flatMap((box, i) => itemsOf(box, i, plan.nodes[i]));
  for (const item of items) {
    item.element = drawBox(item.box, item.place, () => onSelect(item.box));
    item.element.addEventListener("mouseenter", () => near(lines, plan.edges, item.of));
    root.append(item.element);
  }
  root.addEventListener("mouseleave", () => near(lines, plan.edges, -1));
  walkable(items, shown);
  return root;
}

// What can be selected in a box: itself, or its parts; rows of parts count as layers of their own for the arrow keys.
function itemsOf(box, of, { x, y, layer }) {
  if (!box.parts) return [{ box, of, place: { x, y, layer } }];
  const step = 1 / (box.parts[box.parts.length - 1].row + 1);
  return box.parts.map((part) => ({ box: part, of, place: { x: x + part.x, y: y + part.y, layer: layer + part.row * step } }));
}

function frame(box, { x, y }) {
  return svg("rect", { class: "frame", x: x - box.width / 2, y: y - box.height / 2, width: box.width, height: box.height, rx: 10 });
}

// From the lower side of a box to the upper one of another, upright at every bend.
function line(edge, boxes) {
  const points = edge.points.map((p) => p.slice());
  points[0][1] += boxes[edge.from].height / 2;
  points[points.length - 1][1] -= boxes[edge.to].height / 2 + 4;
  let d = `M${at(points[0])}`;
  for (let i = 1; i < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    const middle = (y0 + y1) / 2;
    d += `C${at([x0, middle])} ${at([x1, middle])} ${at([x1, y1])}`;
  }
  const [x, y] = points[points.length - 1];
  return svg("g", { class: boxes[edge.from].light ? "edge light" : "edge" },
    svg("path", { d, fill: "none" }),
    svg("path", { class: "tip", d: `M${at([x - 3.2, y - 2])}L${at([x + 3.2, y - 2])}L${at([x, y + 4])}Z` }));
}

const at = ([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`;

function drawBox(box, { x, y }, select) {
  const [w, h] = [box.width, box.height];
  const round = box.kind === "leaf" || box.kind === "written" || box.kind === "port" ? h / 2 : 5;
  const text = svg("text", { x: 0, y: 4, "text-anchor": "middle" }, svg("tspan", {}, box.name),
    box.note ? svg("tspan", { class: "note", dx: 6 }, box.note) : null);
  const tint = box.tint === undefined ? null : `var(--tint-${box.tint % TINTS})`;
  return svg("g", {
    class: `box ${box.kind} ${box.classes || ""}`, transform: `translate(${at([x, y])})`, role: "button", tabindex: "-1",
    "aria-label": box.label, "aria-pressed": "false", "data-key": box.key, style: tint ? `--tint:${tint}` : null,
    onclick: select,
  }, svg("rect", { x: -w / 2, y: -h / 2, width: w, height: h, rx: round }), text, svg("title", {}, box.label));
}

function near(lines, edges, box) {
  lines.forEach((element, i) => element.classList.toggle("near", edges[i].from === box || edges[i].to === box));
}
