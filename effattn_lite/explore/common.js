// Drawing and control functions of all figures. Python puts this text in front of a figure's own module.

const SVG = "http://www.w3.org/2000/svg";

// elements ----------------------------------------------------------------------------------------

function withParts(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// svgElement("rect", { x: 0, y: 0, width: 9, height: 9, fill: color("accent") }); a function is a listener
function svgElement(tag, attributes = {}, ...children) {
  return withParts(document.createElementNS(SVG, tag), attributes, children);
}

function htmlElement(tag, attributes = {}, ...children) {
  return withParts(document.createElement(tag), attributes, children);
}

// text in a plot; anchor is "start", "middle" or "end"
function svgText(x, y, words, { anchor = "start", ...rest } = {}) {
  return svgElement("text", { x, y, "text-anchor": anchor, ...rest }, String(words));
}

// a polyline through [x, y] pairs in pixels; pairs with a non-finite number break the line
function svgLine(points, { stroke = color("accent"), ...rest } = {}) {
  let pen = "M";
  const d = points.map(([x, y]) => {
    if (!Number.isFinite(x) || !Number.isFinite(y)) { pen = "M"; return ""; }
    const step = `${pen}${x.toFixed(2)} ${y.toFixed(2)}`;
    pen = "L";
    return step;
  });
  return svgElement("path", { d: d.join(""), fill: "none", stroke, "stroke-width": 2, "stroke-linejoin": "round", ...rest });
}

// rows of numbers as squares of one colour, stronger for larger; value / top is the opacity
function heatmap(rows, { x = 0, y = 0, width, height = width, top = null, fill = color("accent"), mark = null }) {
  const limit = top ?? Math.max(1e-12, ...rows.flat().map(Math.abs));
  const w = width / rows[0].length, h = height / rows.length, gap = w > 6 ? 1 : 0;
  const group = svgElement("g", {}, svgElement("rect", { x, y, width, height, fill: color("panel") }));
  rows.forEach((row, i) => row.forEach((value, j) => {
    const paint = mark?.(i, j, value) ?? fill, opacity = Math.min(1, Math.abs(value) / limit);
    if (opacity > 0.004) {
      group.append(svgElement("rect", {
        x: x + j * w, y: y + i * h, width: w - gap, height: h - gap, fill: paint, "fill-opacity": opacity.toFixed(3),
      }));
    }
  }));
  return group;
}

// colours and words -------------------------------------------------------------------------------

// "ink", "muted", "line", "paper", "panel", "accent", "second", "right", "wrong": light and dark
function color(part) {
  return `var(--figure-${part})`;
}

function familyColor(family) {
  return `var(--family-${family.replace(/[^a-z0-9]+/g, "-")})`;
}

// three significant digits: 1234567 -> "1,230,000", 0.01234 -> "0.0123"
function formatNumber(x, digits = 3) {
  if (!Number.isFinite(x)) return x > 0 ? "infinity" : x < 0 ? "minus infinity" : "not a number";
  if (x !== 0 && (Math.abs(x) < 1e-4 || Math.abs(x) >= 1e9)) return x.toExponential(digits - 1).replace("e+", "e");
  return Number(x.toPrecision(Number.isInteger(x) && Math.abs(x) < 1e5 ? 6 : digits)).toLocaleString("en");
}

// 1.5e9, "FLOP" -> "1.5 GFLOP"; with base 1024: 65536, "B" -> "64 KiB"
function formatUnit(x, unit, base = 1000) {
  const prefixes = base === 1000 ? ["", "k", "M", "G", "T", "P", "E"] : ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
  let i = 0;
  for (; Math.abs(x) >= base * 0.9995 && i < prefixes.length - 1; i++) x /= base;
  return `${formatNumber(x)} ${prefixes[i]}${unit}`;
}

// scales ------------------------------------------------------------------------------------------

function makeScale(domain, range, forward, backward, ticks) {
  const [a, b] = domain.map(forward), [p, q] = range;
  const scale = (value) => p + ((forward(value) - a) / (b - a)) * (q - p);
  return Object.assign(scale, { domain, range, ticks, invert: (pixel) => backward(a + ((pixel - p) / (q - p)) * (b - a)) });
}

// linearScale([0, 100], [40, 640])(50) = 340; scale.invert(340) = 50; scale.ticks(5) = round values
function linearScale(domain, range) {
  return makeScale(domain, range, (x) => x, (x) => x, (count = 5) => {
    const [low, high] = [Math.min(...domain), Math.max(...domain)], raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  });
}

function logScale(domain, range, base = 10) {
  const log = (x) => Math.log(x) / Math.log(base);
  return makeScale(domain, range, log, (x) => base ** x, (count = 6) => {
    const [low, high] = [Math.min(...domain), Math.max(...domain)].map(log);
    const first = Math.ceil(low - 1e-9), last = Math.floor(high + 1e-9), step = Math.max(1, Math.ceil((last - first) / count));
    return Array.from({ length: Math.floor((last - first) / step) + 1 }, (_, i) => base ** (first + i * step));
  });
}

// side "bottom" (at = y of the line) or "left" (at = x of the line); grid = length of the grid lines in pixels
function axis(scale, { side = "bottom", at = 0, label = "", ticks = 5, format = formatNumber, grid = 0 } = {}) {
  const flat = side === "bottom", group = svgElement("g", { class: "axis" }), [p, q] = scale.range;
  const at2 = flat ? { y1: at, y2: at } : { x1: at, x2: at };
  group.append(svgElement("line", flat ? { x1: p, x2: q, ...at2 } : { y1: p, y2: q, ...at2 }));
  for (const value of Array.isArray(ticks) ? ticks : scale.ticks(ticks)) {
    const z = scale(value);
    if (flat) {
      group.append(svgElement("line", { x1: z, x2: z, y1: at + 5, y2: at - grid }));
      // a long word under the last tick ends a little after it, or it would leave the drawing
      const words = String(format(value)), last = words.length > 4 && z > Math.max(p, q) - 2;
      group.append(svgText(last ? z + 10 : z, at + 18, words, { anchor: last ? "end" : "middle" }));
    } else {
      group.append(svgElement("line", { x1: at - 5, x2: at + grid, y1: z, y2: z }));
      group.append(svgText(at - 8, z + 4, format(value), { anchor: "end" }));
    }
  }
  if (flat) group.append(svgText((p + q) / 2, at + 36, label, { anchor: "middle" }));
  else group.append(svgText(at, Math.min(p, q) - 10, label, { anchor: at < 80 ? "start" : "middle", dx: at < 80 ? -at : 0 }));
  return group;
}
