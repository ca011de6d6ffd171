// Scores arrive in blocks; m, l and o are kept as a float16 or float32 machine would keep them.

const LARGEST = { float16: 65504, float32: 3.4028234663852886e38 };

// the nearest float16, ties to even; beyond 65520 infinity, below 2^-25 zero
function toHalf(x) {
  const size = Math.abs(x);
  if (!Number.isFinite(x) || size === 0) return x;
  if (size >= 65520) return x > 0 ? Infinity : -Infinity;
  const grid = 2 ** (Math.max(Math.floor(Math.log2(size)), -14) - 10), n = x / grid, low = Math.floor(n);
  const up = n - low > 0.5 || (n - low === 0.5 && low % 2 !== 0);
  return (up ? low + 1 : low) * grid;
}

// the triple after `blocks` blocks, and the factor that the last block put on the old sums
function streamed(scores, values, { block, blocks, round, subtract }) {
  let m = -Infinity, l = 0, o = 0, factor = 1, records = 0;
  for (let b = 0; b < blocks; b++) {
    const x = scores.slice(b * block, (b + 1) * block).map(round), v = values.slice(b * block, (b + 1) * block);
    const seen = Math.max(m, ...x), zero = subtract ? seen : 0;
    factor = subtract ? round(Math.exp(round(m - zero))) : 1;
    if (seen > m && b > 0) records++;
    l = round(l * factor);
    o = round(o * factor);
    x.forEach((score, j) => {
      const p = round(Math.exp(round(score - zero)));
      l = round(l + p);
      o = round(o + round(p * round(v[j])));
    });
    m = seen;
  }
  return { m, l, o, factor, records, mean: round(o / l) };
}

// the mean of the first n keys in float64, with their true maximum
function exactMean(scores, values, n) {
  const top = Math.max(...scores.slice(0, n));
  let sum = 0, total = 0;
  for (let j = 0; j < n; j++) {
    const p = Math.exp(scores[j] - top);
    sum += p;
    total += p * values[j];
  }
  return total / sum;
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), ink = familyColor("softmax attention");
    const blockCount = () => Math.ceil(stage.get("scores").length / stage.get("block"));
    const now = () => {
      const block = stage.get("block"), blocks = Math.min(stage.get("step"), blockCount());
      const scores = stage.get("scores").map((x) => x * stage.get("scale")), values = stage.get("values");
      const round = stage.get("format") === "float16" ? toHalf : Math.fround, subtract = stage.get("subtract");
      const seen = Math.min(blocks * block, scores.length);
      const triple = streamed(scores, values, { block, blocks, round, subtract });
      return { block, blocks, scores, seen, subtract, ...triple, exact: seen ? exactMean(scores, values, seen) : NaN };
    };

    stage.slider("block", { label: "scores in a block", values: [1, 2, 4, 8, 16, 32] });
    stage.slider("scale", { label: "score scale", min: 1, max: 60, step: 1 });
    stage.select("format", { label: "numbers", options: ["float16", "float32"] });
    stage.toggle("subtract", { label: "subtract the maximum" });
    stage.player("step", { label: "blocks taken in", max: blockCount, interval: 700 });

    stage.plot({
      height: 388,
      label: () => `${now().seen} of ${stage.get("scores").length} scores taken in; see the sentence below for the numbers`,
      draw(layer, width) {
        const state = now(), n = state.scores.length, left = 48, right = width - 14;
        drawScores(layer, state, linearScale([0, n], [left, right]), ink);
        drawSums(layer, state, left, right, LARGEST[stage.get("format")], stage.get("format"), ink);
        drawMean(layer, state, left, right, ink);
      },
    });
    stage.readout(() => sentence(now(), stage.get("format")));
    return stage.cleanup;
  },
};

function drawScores(layer, { scores, seen, block, blocks, m }, x, ink) {
  const low = Math.min(...scores), high = Math.max(...scores), y = linearScale([low, high * 1.15], [146, 30]);
  layer.append(axis(y, { side: "left", at: x.range[0], label: "scores", ticks: 4, grid: x.range[1] - x.range[0] }));
  const first = Math.max(0, (blocks - 1) * block), width = x(1) - x(0);
  if (seen) {
    layer.append(svgElement("rect", {
      x: x(first), y: 22, width: x(seen) - x(first), height: 128, fill: color("panel"), stroke: color("accent"), "stroke-dasharray": "4 3",
    }));
  }
  scores.forEach((score, j) => layer.append(svgElement("rect", {
    x: x(j) + width * 0.15, y: Math.min(y(score), y(0)), width: width * 0.7, height: Math.max(1, Math.abs(y(score) - y(0))),
    fill: j >= seen ? "none" : j >= first ? color("accent") : ink, stroke: j >= seen ? color("muted") : "none",
  })));
  if (!seen) return;
  // the running maximum, a stair from block to block
  const stair = [];
  for (let b = 0, top = -Infinity; b < blocks; b++) {
    const end = Math.min((b + 1) * block, scores.length);
    top = Math.max(top, ...scores.slice(b * block, end));
    stair.push([x(b * block), y(top)], [x(end), y(top)]);
  }
  layer.append(svgLine(stair, { stroke: color("second") }));
  const late = x(seen) > x.range[1] - 70;
  // the words lie on the outlines of scores to come: clear the ground around them
  layer.append(svgText(late ? x.range[1] : x(seen) + 5, y(m) - 6, `m = ${formatNumber(m)}`, {
    anchor: late ? "end" : "start", style: `paint-order:stroke;stroke:${color("paper")};stroke-width:5px;stroke-linejoin:round`,
  }));
}

function drawSums(layer, { l, o, seen, factor, subtract, blocks }, left, right, largest, format, ink) {
  const x = logScale([1e-3, largest * (format === "float16" ? 40 : 1e9)], [left, right]), top = 186;
  layer.append(svgText(0, top - 8, "sums, on a logarithmic axis"));
  layer.append(axis(x, { at: top + 58, ticks: right - left < 400 ? 3 : 6, label: "", format: power }));
  [["ℓ", l, 8], ["õ", o, 34]].forEach(([name, value, dy]) => {
    const fits = Number.isFinite(value), end = fits ? Math.max(left, x(Math.max(value, 1e-3))) : right;
    layer.append(svgText(left - 10, top + dy + 13, name, { anchor: "end" }));
    if (!seen) return;
    layer.append(svgElement("rect", { x: left, y: top + dy, width: end - left, height: 18, fill: fits ? ink : color("wrong") }));
    const inside = end > right - 90, words = formatNumber(value);
    layer.append(svgText(inside ? end - 6 : end + 6, top + dy + 14, words, { anchor: inside ? "end" : "start", style: inside ? `fill:${color("paper")}` : null }));
  });
  layer.append(svgElement("line", { x1: x(largest), x2: x(largest), y1: top - 2, y2: top + 58, stroke: color("wrong"), "stroke-width": 2, "stroke-dasharray": "5 3" }));
  layer.append(svgText(x(largest) + 4 > right - 60 ? right : x(largest), top - 8, `largest ${format}`, { anchor: "end" }));
  if (subtract && blocks > 1) {
    layer.append(svgText(right, top + 92, `last block: old sums × ${formatNumber(factor)}`, { anchor: "end", class: "muted" }));
  }
}

function drawMean(layer, { mean, exact, seen }, left, right, ink) {
  const x = linearScale([0, 10], [left, right]), y = 338;
  layer.append(svgText(0, y - 44, "mean õ / ℓ"), axis(x, { at: y, label: "value" }));
  if (!seen) return;
  layer.append(svgElement("line", { x1: x(exact), x2: x(exact), y1: y - 30, y2: y, stroke: color("second"), "stroke-width": 3 }));
  layer.append(svgText(x(exact), y - 34, "exact", { anchor: "middle" }));
  if (Number.isFinite(mean)) layer.append(svgElement("circle", { cx: x(mean), cy: y - 10, r: 7, fill: ink, stroke: color("paper"), "stroke-width": 2 }));
  else layer.append(svgText(x(exact) < (left + right) / 2 ? right : left, y - 8, mean === Infinity ? "õ / ℓ is infinite" : "õ / ℓ is not a number", {
    style: `fill:${color("wrong")}`, anchor: x(exact) < (left + right) / 2 ? "end" : "start",
  }));
}

// 1e-3 -> 10⁻³
function power(value) {
  const digits = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return `10${[...String(Math.round(Math.log10(value)))].map((c) => digits[c]).join("")}`;
}

function sentence({ seen, blocks, scores, block, m, l, o, mean, exact, factor, subtract, records }, format) {
  if (!seen) return `No score taken in yet; ${scores.length} will come in blocks of ${block}. Press Step.`;
  const head = `Block ${blocks}: ${seen} of ${scores.length} scores; m = ${formatNumber(m)}, ℓ = ${formatNumber(l)}, õ = ${formatNumber(o)}. `;
  const moved = subtract
    ? blocks > 1 ? `The old sums were multiplied by ${formatNumber(factor)}; so far the maximum moved ${["never", "once", "twice"][records] ?? `${records} times`}. ` : ""
    : "Nothing was subtracted. ";
  if (!Number.isFinite(mean)) return `${head}${moved}The mean is ${formatNumber(mean)} in ${format}; exact: ${formatNumber(exact)}.`;
  return `${head}${moved}Mean ${formatNumber(mean, 5)}, exact ${formatNumber(exact, 5)}, error ${Math.abs(mean - exact).toExponential(0)}.`;
}
