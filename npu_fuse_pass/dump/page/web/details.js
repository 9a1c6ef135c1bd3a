// The panel beside the graphs: what is known of the box that is selected.

const CHUNK = 200; // rows of a list that are made at once; more come as it is scrolled

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return html("dl", { class: "facts" }, known.map(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]));
}

const chip = (text, onclick) => html("button", { type: "button", class: "chip", onclick }, text);
const groupChip = (g) =>
  filled(chip(data.groups[g].name, () => select(`g${g}`)), { style: `--tint:var(--tint-${g % TINTS})`, "data-group": g }, []);

// A formula with its equals signs below each other; a line without one is a remark.
function formula(text) {
  const rows = text.split("\n").map((row) => {
    const cut = row.indexOf(" = ");
    if (cut < 0) return html("div", { class: "remark" }, row);
    return [html("span", { class: "left" }, row.slice(0, cut)), html("span", {}, "="), html("span", {}, breakable(row.slice(cut + 3)))];
  });
  return html("div", { class: "formula", role: "math", "aria-label": text }, rows);
}

// Long terms break at operators, not inside names.
const breakable = (text) => text.replace(/[·/]/g, "$&\u200b").split("\u200b").flatMap((piece) => [piece, html("wbr")]);

function source(text) {
  if (!text) return null;
  const lines = text.trimEnd().split("\n");
  const shown = lines.map((row) => html("span", { class: /^\s*\/\//.test(row) ? "row comment" : "row" }, withComment(row), "\n"));
  const copy = html("button", { type: "button", class: "quiet" }, "Copy");
  copy.addEventListener("click", () => {
    navigator.clipboard.writeText(text).then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Cannot copy here"; });
  });
  return html("details", { class: "source", open: true },
    html("summary", {}, "Kernel source ", html("span", { class: "muted" }, `${grouped(lines.length)} lines`)),
    copy, html("pre", { tabindex: "0", "aria-label": "Kernel source" }, html("code", {}, shown)));
}

function withComment(row) {
  const cut = row.indexOf("  // ");
  return cut < 0 ? row : [row.slice(0, cut), html("span", { class: "comment" }, row.slice(cut))];
}

// Rows of a long list, made as they are scrolled to; `row(i)` makes one.
function longList(total, row, label) {
  const list = html("div", { class: "list", role: "list", "aria-label": label, tabindex: "0" });
  let made = 0;
  const more = () => {
    const until = Math.min(total, made + CHUNK);
    for (; made < until; made++) {
      const item = filled(row(made), { role: "listitem", "aria-setsize": total, "aria-posinset": made + 1 }, []);
      list.append(item);
    }
  };
  list.addEventListener("scroll", () => {
    if (list.scrollTop + list.clientHeight > list.scrollHeight - 300) more();
  });
  more();
  list.reach = (i) => { while (made <= i && made < total) more(); return list.children[i]; };
  return list;
}

function section(title, ...content) {
  return content.some(Boolean) ? html("section", {}, html("h3", {}, title), content) : null;
}

function groupDetails(g) {
  const group = data.groups[g];
  const moved = group.bytes_per_element * group.elements;
  return [
    html("p", { class: "kind" }, group.writes === "leaves" ? "Fused node" : "Fused node, for original operations"),
    html("h2", { class: "name" }, group.name),
    section("Formula", formula(group.formula)),
    facts([
      ["Members", times(group.updates, "parameter")],
      ["Elements", count(group.elements)],
      ["Type", `${group.dtype} on ${group.device}`],
      ["Launches", group.launches ? `${grouped(group.launches)} per step` : "none"],
      ["Memory", group.bytes_per_element ? `${group.bytes_per_element} bytes per element, ${bytes(moved)} per step` : ""],
      ["Lowering", group.lowering],
      ["Kernel", group.kernel === group.name ? "generated" : group.kernel],
      ["Known kernel", group.match || `none: ${group.no_match}`],
    ]),
    section("Members", ...membersOf(g)),
    source(group.source),
  ];
}

function membersOf(g) {
  return data.families.map((family, f) => (family.groups.includes(g) ? memberList(f) : null)).filter(Boolean);
}

function memberList(f) {
  const family = data.families[f];
  const row = (i) => html("div", {}, html("button", {
    type: "button", class: "member", "aria-pressed": String(state.member[f] === i), onclick: () => showMember(f, i),
  }, html("span", {}, family.members[i]), html("span", { class: "muted" }, family.shapes[family.shape[i]])));
  return filled(longList(family.members.length, row, `${family.members.length} parameters`), { "data-family": f }, []);
}

function operationDetails(node, f) {
  const member = f === null ? 0 : state.member[f];
  const family = f === null ? null : data.families[f];
  const repeated = family && Array.isArray(node.origin) ? "its own node in the graph" : "";
  return [
    html("p", { class: "kind" }, KINDS[node.kind] || node.kind),
    html("h2", { class: "name" }, node.name),
    facts([
      ["Numbers", textOf(node.note, member)],
      ["Captured as", originOf(node, member)],
      ["For", family ? family.members[member] : "several parameters"],
      ["Repeated", family && family.members.length > 1
        ? `${times(family.members.length, "parameter")}, ${node.listed ? "one list operation" : repeated || "the same"}` : ""],
      ["One after the other", node.count > 1 ? times(node.count, "time") : ""],
      ["Value", node.scalar ? "a number for each parameter" : ""],
    ]),
    section("Called at", node.source ? html("pre", { class: "line" }, node.source.replace("  ", "\n")) : null),
    section(node.kind === "op" ? "Taken by" : "Read by",
      node.groups && node.groups.length ? html("p", {}, node.groups.map(groupChip)) : notTaken(node, f)),
  ];
}

const KINDS = { op: "Operation before fusing", leaf: "Leaf", port: "Computed in another drawing", kept: "Original operation",
  total: "Sum over parameters", written: "Written", contribute: "What parameters add to a total" };

function notTaken(node, f) {
  if (node.kept) return html("p", {}, "It stays as it is. ", reasonFor(node.name));
  if (node.kind !== "leaf" || f === null) return null;
  return html("p", {}, data.families[f].groups.map(groupChip));
}

function reasonFor(name) {
  const found = data.unfused.find((u) => u.op.replace(/^_foreach_|_$/g, "") === name || u.op === name);
  return found ? found.text : "";
}

function boxDetails(box) {
  const names = box.origin || [];
  return [
    html("p", { class: "kind" }, KINDS[box.kind]),
    html("h2", { class: "name" }, box.name),
    facts([["Stands for", names.length > 1 ? grouped(names.length) : ""], ["Value", box.scalar ? "a number" : ""],
      ["Why", box.kind === "kept" ? reasonFor(box.name) : ""]]),
    names.length ? section("Names", longList(names.length, (i) => html("div", { class: "plain" }, data.names[names[i]]), "Names")) : null,
  ];
}

function nothingSelected() {
  return [
    html("h2", {}, "How to read this page"),
    html("p", {}, "Left is what the step does for one parameter of each kind; right is what runs after fusing."),
    html("p", {}, "Select a fused node: the operations that it took light up, and its formula, members and source are shown here. "
      + "Select an operation to see which fused node took it."),
    data.groups.length ? section("Fused nodes", html("p", {}, data.groups.map((_, g) => groupChip(g)))) : null,
  ];
}
