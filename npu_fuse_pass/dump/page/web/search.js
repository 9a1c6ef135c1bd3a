// One list of everything that has a name, searched by its parts; the index is made when first asked for.

const SHOWN = 60;

function* named() {
  for (const [g, group] of data.groups.entries()) {
    yield { what: "fused node", text: group.name, more: group.formula, go: () => select(`g${g}`, true) };
  }
  for (const [f, family] of data.families.entries()) {
    for (const [i, node] of family.nodes.entries()) {
      yield { what: WHAT[node.kind], text: node.name, more: `${originOf(node, 0)} ${node.source || ""}`, go: () => select(`f${f}.${i}`, true) };
    }
  }
  for (const [i, node] of (data.shared ? data.shared.nodes : []).entries()) {
    yield { what: WHAT[node.kind], text: node.name, more: originOf(node, 0), go: () => select(`s.${i}`, true) };
  }
  for (const [i, box] of data.after.entries()) {
    if (box.kind !== "fused") yield { what: "after", text: box.name, more: originOf({ origin: box.origin }, 0), go: () => select(`a${i}`, true) };
  }
  for (const [f, family] of data.families.entries()) {
    for (let i = 0; i < family.members.length; i++) {
      yield { what: "parameter", text: family.members[i], more: "", go: () => showMember(f, i, true) };
    }
  }
}

const WHAT = { op: "operation", leaf: "leaf", port: "operation" };
let index = null;

function find(words) {
  index = index || Array.from(named(), (item) => ({ ...item, key: `${item.text} ${item.more}`.toLowerCase() }));
  const hits = [];
  for (const item of index) {
    if (words.every((word) => item.key.includes(word))) hits.push(item);
  }
  const first = words.join(" ");
  return hits.sort((a, b) => b.text.toLowerCase().startsWith(first) - a.text.toLowerCase().startsWith(first));
}

function startSearch(input, list) {
  let hits = [];
  let chosen = -1;
  const close = () => {
    list.hidden = true;
    chosen = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const choose = (i) => {
    chosen = hits.length ? (i + hits.length) % hits.length : -1;
    [...list.children].forEach((row, k) => row.setAttribute("aria-selected", String(k === chosen)));
    if (chosen >= 0) {
      list.children[chosen].scrollIntoView({ block: "nearest" });
      input.setAttribute("aria-activedescendant", list.children[chosen].id);
    }
  };
  const take = (i) => {
    const hit = hits[i];
    close();
    if (hit) hit.go();
  };
  const update = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return close();
    const all = find(words);
    hits = all.slice(0, SHOWN);
    list.replaceChildren(...hits.map((hit, i) => option(hit, i, take)), ...remark(all.length));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    choose(0);
  };
  input.addEventListener("input", update);
  input.addEventListener("focus", () => { if (input.value) update(); });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const act = { ArrowDown: () => choose(chosen + 1), ArrowUp: () => choose(chosen - 1), Enter: () => take(chosen),
      Escape: () => { input.value = ""; close(); input.blur(); } }[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });
}

// mousedown, not click: the list closes when the input loses the focus.
function option(hit, i, take) {
  const choose = (event) => { event.preventDefault(); take(i); };
  return html("li", { role: "option", id: `found-${i}`, "aria-selected": "false", onmousedown: choose },
    html("span", { class: "text" }, hit.text), html("span", { class: "muted more" }, clipped(hit.more.trim(), 60)),
    html("span", { class: "muted what" }, hit.what));
}

function remark(total) {
  if (total > SHOWN) return [html("li", { class: "muted end", role: "presentation" }, `${grouped(total - SHOWN)} more`)];
  return total ? [] : [html("li", { class: "muted end", role: "presentation" }, "Nothing has this name")];
}
