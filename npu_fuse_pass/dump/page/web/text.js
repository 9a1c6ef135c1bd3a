// Elements and numbers. Text always goes in as text nodes: names may hold anything.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const html = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

// 2772 -> "2 772" with a narrow space that does not break
const grouped = (n) => Math.round(n).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");

// three digits: 1.23, 12.3, 123
const short = (n) => (n >= 100 ? grouped(n) : n >= 10 ? String(+n.toFixed(1)) : String(+n.toPrecision(3)));

function scaled(n, base, units) {
  let i = 0;
  while (n >= base && i < units.length - 1) [n, i] = [n / base, i + 1];
  return `${short(n)}${units[i] ? "\u202f" + units[i] : ""}`;
}

const bytes = (n) => scaled(n, 1000, ["B", "kB", "MB", "GB", "TB"]);
const count = (n) => (n < 10000 ? grouped(n) : scaled(n, 1000, ["", "k", "M", "G", "T"]));
const seconds = (s) => scaled(s * 1e9, 1000, ["ns", "µs", "ms", "s"]);
const times = (n, what) => `× ${grouped(n)} ${what}${n === 1 ? "" : "s"}`;

// a text that all members share, or one for each
const textOf = (text, member) => (Array.isArray(text) ? text[member] : text) || "";

// the name in the captured graph; of several members, numbers in the table of names
const originOf = (node, member) => (Array.isArray(node.origin) ? data.names[node.origin[member]] : node.origin || "");
