// The boxes of the fused step. Leaves that the same box reads, and what it writes, share a frame.

const FRAMED = 3; // from as many on

function afterBoxes() {
  const framed = frames();
  const place = new Map(); // a box's number in the data -> the one that it has in the drawing
  const boxes = [];
  data.after.forEach((box, i) => {
    const parts = framed.get(i) || [i];
    if (parts[0] === i) {
      const made = parts.map((k) => afterBox(data.after[k], k));
      boxes.push(made.length > 1 ? { parts: made, args: box.args || [] } : made[0]);
    }
    place.set(i, parts[0] === i ? boxes.length - 1 : place.get(parts[0]));
  });
  for (const box of boxes) box.args = [...new Set(box.args.map((a) => place.get(a)))];
  return boxes;
}

// For each box in a frame: all boxes of that frame.
function frames() {
  const readers = data.after.map(() => []);
  data.after.forEach((box, i) => (box.args || []).forEach((a) => readers[a].push(i)));
  const alike = new Map();
  data.after.forEach((box, i) => {
    const key = { leaf: `leaf of ${readers[i]}`, written: `written by ${box.args}` }[box.kind];
    if (key) alike.set(key, [...(alike.get(key) || []), i]);
  });
  return new Map([...alike.values()].filter((all) => all.length >= FRAMED).flatMap((all) => all.map((i) => [i, all])));
}

function afterBox(box, i) {
  const several = box.count > 1 ? `× ${grouped(box.count)}` : "";
  const fused = box.kind === "fused";
  return {
    kind: box.kind, name: clipped(box.name, 26), note: several, args: box.args || [], key: fused ? `g${box.group}` : `a${i}`,
    label: [fused ? "Fused node" : KINDS[box.kind], box.name, several].filter(Boolean).join(", "), classes: box.scalar ? "scalar" : "",
    light: box.scalar, tint: box.group, height: fused ? 40 : undefined,
  };
}
