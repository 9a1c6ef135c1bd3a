// Arrow keys walk through a drawing: one box of it is in the order of Tab, the others are reached from there.

const UP_OR_DOWN = { ArrowUp: -1, ArrowDown: 1 };
const LEFT_OR_RIGHT = { ArrowLeft: -1, ArrowRight: 1 };

function walkable(items, boxes) {
  if (!items.length) return;
  items[0].element.setAttribute("tabindex", "0");
  const go = (next) => {
    items.forEach((item) => item.element.setAttribute("tabindex", item === next ? "0" : "-1"));
    next.element.focus();
  };
  items.forEach((item) => item.element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      item.element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    } else if (event.key in UP_OR_DOWN || event.key in LEFT_OR_RIGHT) {
      const upright = event.key in UP_OR_DOWN;
      const next = upright ? across(item, UP_OR_DOWN[event.key], items, boxes) : beside(item, LEFT_OR_RIGHT[event.key], items);
      if (next) go(next);
    } else {
      return;
    }
    event.preventDefault();
  }));
}

// The nearest box in this direction; one that an edge leads to before others, but for the rows of one frame.
function across(from, step, items, boxes) {
  const joined = (to) => to.of === from.of || boxes[step < 0 ? from.of : to.of].args.includes(step < 0 ? to.of : from.of);
  const candidates = items.filter((to) => (to.place.layer - from.place.layer) * step > 0);
  const far = (to) => Math.abs(to.place.layer - from.place.layer) * 1e4 + Math.abs(to.place.x - from.place.x);
  return nearest(candidates.filter(joined), far) || nearest(candidates, far);
}

function beside(from, step, items) {
  const row = items.filter((to) => to.place.layer === from.place.layer && (to.place.x - from.place.x) * step > 0);
  return nearest(row, (to) => Math.abs(to.place.x - from.place.x));
}

function nearest(candidates, far) {
  return candidates.length ? candidates.reduce((best, item) => (far(item) < far(best) ? item : best)) : null;
}
