// A layered drawing of a directed graph without cycles: layers by depth, few crossings, short straight edges.
// Boxes come as {width, height, args}, arguments before what reads them; the result gives each x, y (of the centre)
// and layer, and every edge its points.

const GAP_X = 14;
const GAP_Y = 30;
const SWEEPS = 12;

function layered(boxes) {
  const layer = layersOf(boxes);
  const { cells, edges } = withBends(boxes, layer);
  const rows = rowsOf(cells);
  order(rows, cells);
  const width = place(rows, cells);
  const height = stack(rows, boxes, cells);
  return {
    width, height,
    nodes: boxes.map((_, i) => ({ x: cells[i].x, y: cells[i].y, layer: cells[i].layer })),
    edges: edges.map((edge) => ({ ...edge, points: edge.through.map((c) => [cells[c].x, cells[c].y]) })),
  };
}

// Depth from the inputs; then what has more readers than arguments moves down to them.
function layersOf(boxes) {
  const readers = boxes.map(() => []);
  boxes.forEach((box, i) => box.args.forEach((a) => readers[a].push(i)));
  const layer = boxes.map(() => 0);
  boxes.forEach((box, i) => { layer[i] = Math.max(-1, ...box.args.map((a) => layer[a])) + 1; });
  for (let i = boxes.length - 1; i >= 0; i--) {
    const inner = boxes[i].args.length;
    if (readers[i].length && (inner === 0 || inner < readers[i].length || boxes[i].light)) {
      layer[i] = Math.min(...readers[i].map((r) => layer[r])) - 1;
    }
  }
  return layer;
}

// An edge over several layers bends in each of them: a cell without a box.
function withBends(boxes, layer) {
  const cells = boxes.map((box, i) => ({ width: box.width, layer: layer[i], up: [], down: [], bend: false }));
  const edges = [];
  boxes.forEach((box, to) => box.args.forEach((from) => {
    const through = [from];
    for (let at = layer[from] + 1; at < layer[to]; at++) {
      through.push(cells.push({ width: 2, layer: at, up: [], down: [], bend: true }) - 1);
    }
    through.push(to);
    for (let k = 1; k < through.length; k++) {
      cells[through[k - 1]].down.push(through[k]);
      cells[through[k]].up.push(through[k - 1]);
    }
    edges.push({ from, to, through });
  }));
  return { cells, edges };
}

function rowsOf(cells) {
  const rows = [];
  cells.forEach((cell, i) => (rows[cell.layer] = rows[cell.layer] || []).push(i));
  return Array.from(rows, (row) => row || []);
}

// Sweeps down and up put each cell at the mean place of its neighbours; the order with the fewest crossings stays.
function order(rows, cells) {
  const number = () => rows.forEach((row) => row.forEach((c, i) => { cells[c].at = i; }));
  number();
  let best = { crossings: crossings(rows, cells), rows: rows.map((row) => row.slice()) };
  for (let sweep = 0; sweep < SWEEPS && best.crossings > 0; sweep++) {
    const down = sweep % 2 === 0;
    for (const row of down ? rows : rows.slice().reverse()) {
      const mean = new Map(row.map((c) => [c, meanOf(cells[c][down ? "up" : "down"].map((n) => cells[n].at), cells[c].at)]));
      row.sort((a, b) => mean.get(a) - mean.get(b));
      row.forEach((c, i) => { cells[c].at = i; });
    }
    const now = crossings(rows, cells);
    if (now < best.crossings) best = { crossings: now, rows: rows.map((row) => row.slice()) };
  }
  best.rows.forEach((row, i) => { rows[i] = row; });
  number();
}

const meanOf = (values, otherwise) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : otherwise);

function crossings(rows, cells) {
  let found = 0;
  for (const row of rows) {
    const ends = row.flatMap((c) => cells[c].down.map((n) => cells[n].at).sort((a, b) => a - b));
    for (let i = 0; i < ends.length; i++) for (let j = 0; j < i; j++) if (ends[j] > ends[i]) found++;
  }
  return found;
}

// Places in a row as close as possible to the neighbours' means, at least a gap apart.
function place(rows, cells) {
  for (const row of rows) {
    let x = 0;
    for (const c of row) {
      cells[c].x = x + cells[c].width / 2;
      x += cells[c].width + GAP_X;
    }
  }
  for (let pass = 0; pass < 2 * SWEEPS; pass++) {
    for (const row of pass % 2 ? rows.slice().reverse() : rows) pull(row, cells, pass);
  }
  const left = Math.min(...cells.map((c) => c.x - c.width / 2));
  cells.forEach((c) => { c.x -= left; });
  return Math.max(...cells.map((c) => c.x + c.width / 2));
}

function pull(row, cells, pass) {
  let offset = 0;
  let before = null;
  const blocks = []; // runs of cells that touch: mean of what they want, and their weight
  for (const c of row) {
    const cell = cells[c];
    if (before) offset += (before.width + cell.width) / 2 + (before.bend && cell.bend ? GAP_X / 2 : GAP_X);
    before = cell;
    cell.offset = offset;
    const near = pass < SWEEPS ? (pass % 2 ? cell.down : cell.up) : [...cell.up, ...cell.down];
    const wanted = meanOf(near.map((n) => cells[n].x), cell.x) - offset;
    let block = { wanted, weight: cell.bend ? 4 : 1, cells: [c] };
    while (blocks.length && blocks[blocks.length - 1].wanted > block.wanted) {
      const last = blocks.pop();
      const weight = last.weight + block.weight;
      block = {
        wanted: (last.wanted * last.weight + block.wanted * block.weight) / weight,
        weight, cells: last.cells.concat(block.cells),
      };
    }
    blocks.push(block);
  }
  for (const block of blocks) for (const c of block.cells) cells[c].x = block.wanted + cells[c].offset;
}

function stack(rows, boxes, cells) {
  let y = 0;
  for (const row of rows) {
    const tallest = Math.max(...row.map((c) => (boxes[c] ? boxes[c].height : 0)));
    row.forEach((c) => { cells[c].y = y + tallest / 2; });
    y += tallest + GAP_Y;
  }
  return y - GAP_Y;
}
