// The numbers above the graphs, and what stands in the way of fusing.

function change(before, after, text) {
  return html("dd", {}, html("span", { class: "old" }, before === null ? "–" : text(before)),
    html("span", { class: "arrow", "aria-label": "to" }, "→"), html("span", { class: "new" }, after === null ? "–" : text(after)));
}

function tile(name, value, ...remark) {
  return html("div", { class: "tile" }, html("dt", {}, name), value, html("dd", { class: "remark" }, remark));
}

function compared(name, before, after, text, remark) {
  const times = before && after && before / after >= 1.05 ? html("span", { class: "ratio" }, `${short(+(before / after).toPrecision(3))}× fewer`) : null;
  return tile(name, change(before, after, text), times, remark);
}

function totals() {
  const t = data.totals;
  const known = "before" in t.bytes;
  const tiles = [
    tile("Parameters", html("dd", {}, html("span", { class: "new" }, grouped(t.parameters))), `${count(t.elements)} elements`),
    compared("Graph nodes", t.nodes[0], t.nodes[1], grouped, t.of),
    compared("Kernel calls", t.operations, t.launches, grouped, "before: one each operation and tensor"),
    known ? compared("Bytes per element", t.bytes.before, t.bytes.after, short) : tile("Bytes per element", html("dd", {}, "not known")),
  ];
  if (known) {
    tiles.push(compared("Traffic per step", t.bytes.before * t.elements, t.bytes.after * t.elements, bytes), modelled());
  }
  const measured = data.measured;
  if ("after" in measured) tiles.push(compared("Time per step, measured", measured.before || null, measured.after, seconds));
  return tiles;
}

// Time that the traffic takes at a bandwidth which the reader may change.
function modelled() {
  const [value, remark] = [html("dd", {}), html("dd", { class: "remark" })];
  const input = html("input", { type: "number", min: 1, step: "any", value: data.bandwidth.value, "aria-label": "Bandwidth in GB/s" });
  const update = () => {
    const speed = Number(input.value) * 1e9;
    const time = (n) => (speed > 0 ? (n * data.totals.elements) / speed : null);
    value.replaceChildren(...change(time(data.totals.bytes.before), time(data.totals.bytes.after), seconds).childNodes);
  };
  input.addEventListener("input", update);
  update();
  remark.append("at ", input, " GB/s", html("span", { class: "why" }, ` (${data.bandwidth.why})`));
  return html("div", { class: "tile" }, html("dt", {}, "Time per step, modelled"), value, remark);
}

function notices() {
  const found = [];
  if (data.fallback) found.push(notice(data.interpreted ? "No kernels" : "The original runs", [data.fallback], "bad"));
  if (data.unfused.length) found.push(notice("Not fused", data.unfused.map((u) => u.text), "warn"));
  if (data.graph_break) found.push(notice("The graph ends at a break", [data.graph_break], "warn"));
  return found;
}

function notice(title, lines, kind) {
  return html("section", { class: `notice ${kind}`, role: "note" }, html("h2", {}, title), html("ul", {}, lines.map((text) => html("li", {}, text))));
}
