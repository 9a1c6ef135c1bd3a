// The page's state: what is selected, which member each family shows, light or dark.
// Keys of boxes: g1 a fused node, f0.12 an operation of a family, s.3 one over several parameters, a5 a box after fusing.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { selected: null, member: data.families.map(() => 0) };
const part = (selector) => document.querySelector(selector);

function parsed(key) {
  const [place, number] = key.slice(1).split(".").map(Number);
  const of = { g: () => ({ group: place }), a: () => ({ box: data.after[place] }),
    f: () => ({ node: data.families[place].nodes[number], family: place }),
    s: () => ({ node: data.shared.nodes[number], family: null }) };
  return of[key[0]]();
}

// Fused nodes that a box belongs to: those that took it, read it or wrote it.
function groupsOf(key) {
  const { group, node, family, box } = parsed(key);
  if (group !== undefined) return [group];
  if (node) return node.kind === "leaf" && family !== null ? data.families[family].groups : node.groups || [];
  if (box.group !== undefined) return [box.group];
  const at = data.after.indexOf(box);
  const around = data.after.filter((other) => (other.args || []).includes(at)).concat((box.args || []).map((a) => data.after[a]));
  return around.map((other) => other.group).filter((g) => g !== undefined);
}

function select(key, reveal = false) {
  const box = key && key[0] === "a" ? parsed(key).box : null;
  state.selected = box && box.kind === "fused" ? `g${box.group}` : key;
  if (reveal && key) bringIntoView(state.selected);
  light();
  showDetails();
}

function bringIntoView(key) {
  if (key[0] === "f") drawFamily(parsed(key).family);
  const element = part(`[data-key="${key}"]`);
  if (!element) return;
  element.scrollIntoView({ block: "center", inline: "center" });
  element.focus({ preventScroll: true });
}

// Selecting a fused node lights the operations that it took; selecting an operation, the fused nodes that took it.
function light() {
  const key = state.selected;
  document.body.classList.toggle("selecting", Boolean(key));
  const groups = key ? new Set(groupsOf(key)) : new Set();
  const whole = key && key[0] === "g";
  for (const element of document.querySelectorAll(".box")) {
    const own = element.dataset.key;
    const is = own === key;
    const lit = key && !is && (own[0] === "g" || whole) && groupsOf(own).some((g) => groups.has(g));
    element.classList.toggle("selected", is);
    element.classList.toggle("lit", Boolean(lit));
    element.setAttribute("aria-pressed", String(is));
  }
}

function showDetails() {
  const panel = part("#details");
  const key = state.selected;
  panel.classList.toggle("open", Boolean(key));
  if (!key) return panel.replaceChildren(...nothingSelected().filter(Boolean));
  const { group, node, family, box } = parsed(key);
  const content = group !== undefined ? groupDetails(group) : node ? operationDetails(node, family) : boxDetails(box);
  const close = html("button", { type: "button", class: "quiet close", "aria-label": "Close the details", onclick: () => select(null) }, "Close");
  panel.replaceChildren(close, ...content.filter(Boolean));
  panel.scrollTop = 0;
}

function startTheme() {
  const button = part("#theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const apply = () => {
    const theme = chosen || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
  };
  dark.addEventListener("change", apply);
  button.addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    apply();
  });
  apply();
}

function startKeys() {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest && event.target.closest("input, textarea");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      part("#search").focus();
    } else if (event.key === "Escape") {
      select(null);
    }
  });
}

function start() {
  startTheme();
  part("h1").append(data.title);
  part(".subtitle").append([`torch ${data.torch}`, data.cause === "compile" ? "" : `planned anew: ${data.cause}`].filter(Boolean).join(" · "));
  part("#totals").append(...totals());
  part("#notices").append(...notices());
  part("#before .cards").append(...data.families.map((_, f) => cardOf(f)), ...(data.shared ? [sharedCard()] : []), ...captured());
  part("#before-title .muted").append(times(data.totals.operations, "operation").slice(2));
  part("#after-title .muted").append(times(data.totals.launches, "kernel call").slice(2));
  if (data.after.length) part("#after .drawing").append(draw(afterBoxes(), "The fused step", (box) => select(box.key)));
  else part("#after .drawing").append(html("p", { class: "muted" }, "Nothing was fused."));
  startSearch(part("#search"), part("#found"));
  startKeys();
  showDetails();
  document.documentElement.dataset.ready = "yes";
}

// Where nothing was fused: what the graph consists of.
function captured() {
  if (!data.captured.length) return [];
  const rows = data.captured.map(([name, n]) => html("tr", {}, html("td", {}, name), html("td", {}, `× ${grouped(n)}`)));
  return [html("article", { class: "card" }, html("table", { class: "operations" }, html("caption", {}, "Operations of the graph"), html("tbody", {}, rows)))];
}

start();
