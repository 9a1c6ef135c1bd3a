// The drawings of the step before fusing: a card for each family of parameters, one for what they have together.

function cardOf(f) {
  const family = data.families[f];
  const operations = family.nodes.filter((node) => node.kind === "op").length;
  const list = html("div", { class: "members", hidden: true });
  const toggle = html("button", { type: "button", class: "expand", "aria-expanded": "false" }, times(family.members.length, "parameter"));
  const picked = html("p", { class: "picked", hidden: true });
  const drawing = html("div", { class: "drawing" });
  const card = html("article", { class: "card", "aria-label": `${family.members.length} parameters` },
    html("div", { class: "card-head" }, toggle, html("span", { class: "muted" }, times(operations, "operation").slice(2) + " each"),
      html("span", { class: "chips" }, family.groups.map(groupChip))), list, picked, drawing);
  const expand = (open) => {
    if (open && !list.firstChild) list.append(memberList(f));
    list.hidden = !open;
    toggle.setAttribute("aria-expanded", String(open));
  };
  toggle.addEventListener("click", () => expand(list.hidden));
  cards[f] = { card, drawing, picked, expand, drawn: false };
  whenSeen(card, () => drawFamily(f));
  return card;
}

const cards = [];

// Drawings below the screen are made when they come into it.
function whenSeen(element, act) {
  if (!("IntersectionObserver" in window)) return act();
  const watch = new IntersectionObserver((seen) => {
    if (!seen.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    act();
  }, { rootMargin: "400px" });
  watch.observe(element);
}

function drawFamily(f, again = false) {
  const card = cards[f];
  if (card.drawn && !again) return;
  card.drawn = true;
  const family = data.families[f];
  const boxes = family.nodes.map((node, i) => operationBox(node, `f${f}.${i}`, state.member[f]));
  card.drawing.replaceChildren(draw(boxes, `Operations for ${family.members[state.member[f]]}`, (box) => select(box.key)));
  light();
}

function sharedCard() {
  const boxes = data.shared.nodes.map((node, i) => operationBox(node, `s.${i}`, 0));
  const drawing = html("div", { class: "drawing" }, draw(boxes, "Operations over several parameters", (box) => select(box.key)));
  return html("article", { class: "card" },
    html("div", { class: "card-head" }, html("strong", {}, "Over all parameters"), html("span", { class: "muted" }, "totals")), drawing);
}

function operationBox(node, key, member) {
  const taken = (node.groups || []).map((g) => data.groups[g].name);
  const note = node.count > 1 ? `× ${grouped(node.count)}` : textOf(node.note, member);
  const words = [KINDS[node.kind], node.name, textOf(node.note, member), taken.length ? `taken by ${taken.join(" and ")}` : node.kept ? "stays as it is" : ""];
  const kind = node.kept ? "kept" : node.kind;
  return {
    kind, name: clipped(node.name, 24), note: node.kind === "leaf" ? "" : note, args: node.args || [], key,
    label: words.filter(Boolean).join(", "), classes: node.scalar ? "scalar" : "", light: node.scalar,
    tint: node.groups && node.groups.length ? node.groups[0] : undefined,
  };
}

// Another parameter of a family takes the drawing over: its names, its numbers.
function showMember(f, i, reveal = false) {
  state.member[f] = i;
  const { card, picked } = cards[f];
  const family = data.families[f];
  drawFamily(f, true);
  picked.hidden = i === 0;
  picked.replaceChildren("Shown for ", html("strong", {}, family.members[i]), ` ${family.shapes[family.shape[i]]} `,
    html("button", { type: "button", class: "quiet", onclick: () => showMember(f, 0) }, "Back to the first"));
  if (reveal) {
    cards[f].expand(true);
    card.querySelector(".list").reach(i).scrollIntoView({ block: "nearest" });
    card.scrollIntoView({ block: "start" });
    card.querySelector(".list").children[i].firstChild.focus();
  }
  for (const list of document.querySelectorAll(`.list[data-family="${f}"]`)) {
    [...list.children].forEach((row, k) => row.firstChild.setAttribute("aria-pressed", String(k === i)));
  }
  if (state.selected && state.selected[0] === "f") showDetails();
}
