// A cloud of estimates of e^(q.k) for each kind of random features, and the law of their spread.

const ROWS = [
  { key: "free", words: "positive", name: "independent positive features", paint: () => familyColor("feature map") },
  { key: "bound", words: "positive, orthogonal", name: "orthogonal positive ones", paint: () => color("second") },
  { key: "waves", words: "sine and cosine", name: "sines and cosines", paint: () => color("accent") },
];

// uniform numbers in (0, 1) from a seed
function uniform(seed) {
  let a = (seed * 2654435761) >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
}

function normals(seed) {
  const next = uniform(seed);
  let kept = null;
  return () => {
    if (kept !== null) { const x = kept; kept = null; return x; }
    const r = Math.sqrt(-2 * Math.log(next())), a = 2 * Math.PI * next();
    kept = r * Math.sin(a);
    return r * Math.cos(a);
  };
}

// what M frequencies of K entries have along two axes at a right angle, [M, 2], for every estimate
function drawAll({ seed, features, draws, width: K }) {
  const normal = normals(seed), free = [], bound = [];
  for (let d = 0; d < draws; d++) {
    const a = new Float64Array(2 * features), b = new Float64Array(2 * features);
    for (let i = 0; i < 2 * features; i++) a[i] = normal();
    for (let start = 0; start < features; start += K) {
      // two columns of a random orthogonal matrix are what its K rows have along the two axes
      const u = Array.from({ length: K }, normal), v = Array.from({ length: K }, normal);
      const uu = Math.sqrt(u.reduce((s, x) => s + x * x, 0)), uv = u.reduce((s, x, i) => s + x * v[i], 0) / (uu * uu);
      const w = v.map((x, i) => x - uv * u[i]), ww = Math.sqrt(w.reduce((s, x) => s + x * x, 0));
      for (let i = 0; i < Math.min(K, features - start); i++) {
        let square = 0;
        for (let j = 0; j < K; j++) square += normal() ** 2;
        b[2 * (start + i)] = (Math.sqrt(square) * u[i]) / uu;
        b[2 * (start + i) + 1] = (Math.sqrt(square) * w[i]) / ww;
      }
    }
    free.push(a);
    bound.push(b);
  }
  return { free, bound };
}

// estimates over the true value
function ratios(drawn, { angle, length, features }) {
  const a = (angle * Math.PI) / 180, half = a / 2;
  // u = q + k along the first axis, q - k along the second
  const plus = 2 * length * Math.cos(half), minus = 2 * length * Math.sin(half);
  const positive = (p) => {
    let sum = 0;
    for (let m = 0; m < features; m++) sum += Math.exp(plus * p[2 * m] - (plus * plus) / 2);
    return sum / features;
  };
  const wave = (p) => {
    let sum = 0;
    for (let m = 0; m < features / 2; m++) sum += Math.cos(minus * p[2 * m + 1]);
    return (Math.exp((minus * minus) / 2) * sum * 2) / features;
  };
  return { free: drawn.free.map(positive), bound: drawn.bound.map(positive), waves: drawn.free.map(wave) };
}

// standard deviation over the true value, by theory; sine and cosine share a frequency
const lawPositive = (degrees, length, M) => Math.sqrt(Math.expm1(4 * length * length * Math.cos((degrees * Math.PI) / 360) ** 2) / M);
const lawWaves = (degrees, length, M) => (2 / Math.sqrt(M)) * Math.sinh(2 * length * length * Math.sin((degrees * Math.PI) / 360) ** 2);

const quantile = (sorted, p) => sorted[Math.min(sorted.length - 1, Math.floor(p * sorted.length))];

export default {
  render({ model, el }) {
    const stage = makeStage(model, el);
    let cache = { id: null };

    const now = () => {
      const s = Object.fromEntries(["angle", "length", "features", "seed", "draws", "width"].map((key) => [key, stage.get(key)]));
      if (cache.id !== `${s.seed} ${s.features}`) cache = { id: `${s.seed} ${s.features}`, drawn: drawAll(s), at: null };
      if (cache.at !== `${s.angle} ${s.length}`) {
        const found = ratios(cache.drawn, s);
        cache.rows = ROWS.map((row) => {
          const all = found[row.key], sorted = [...all].sort((a, b) => a - b);
          return {
            ...row, all, mean: all.reduce((a, b) => a + b, 0) / all.length, low: quantile(sorted, 0.25), mid: quantile(sorted, 0.5),
            high: quantile(sorted, 0.75), negative: all.filter((x) => x < 0).length,
          };
        });
        cache.at = `${s.angle} ${s.length}`;
      }
      return { ...s, truth: Math.exp(s.length * s.length * Math.cos((s.angle * Math.PI) / 180)), rows: cache.rows };
    };

    stage.slider("length", { label: "length of q and k", values: stage.get("lengths"), format: (x) => String(x) });
    stage.slider("features", { label: "features M", values: stage.get("counts"), format: (x) => x.toLocaleString("en") });
    stage.button({ label: "Turn k onto q", press: () => stage.set({ angle: 0 }), disabled: () => stage.get("angle") === 0 });
    stage.button({ label: "Turn k against q", press: () => stage.set({ angle: 180 }), disabled: () => stage.get("angle") === 180 });
    stage.button({ label: "Draw again", press: () => stage.set({ seed: stage.get("seed") + 1 }) });

    // linear around 0, logarithmic far away, with a mirror for what is negative
    const bend = (x) => Math.asinh(4 * x), LOW = -300, HIGH = 3000;
    const across = (width) => linearScale([bend(LOW), bend(HIGH)], [12, width - 12]);

    stage.plot({
      height: 256,
      label: () => "Estimates over the true weight, one dot each, in three rows; the line at 1 is the truth",
      draw(layer, width) {
        const state = now(), x = across(width), tall = 66, bottom = 24 + 3 * tall;
        const ticks = width < 480 ? [-100, -1, 0, 1, 100] : [-100, -10, -1, 0, 1, 10, 100, 1000];
        for (const tick of ticks) {
          layer.append(
            svgElement("line", { x1: x(bend(tick)), x2: x(bend(tick)), y1: 12, y2: bottom, stroke: color(tick === 1 ? "right" : "line"), "stroke-width": tick === 1 ? 2 : 1 }),
            svgText(x(bend(tick)), bottom + 14, formatNumber(tick), { anchor: "middle", class: "muted" }),
          );
        }
        layer.append(svgText(width / 2, bottom + 31, "estimate / true weight; the bar is the median", { anchor: "middle", class: "muted" }));
        state.rows.forEach((row, r) => {
          const top = 12 + r * tall, next = uniform(97 + r);
          layer.append(svgText(12, top + 13, row.words, { "font-weight": 600 }));
          if (row.negative) layer.append(svgText(width - 12, top + 13, `${formatNumber((100 * row.negative) / row.all.length)} % negative`, { anchor: "end", fill: color("wrong") }));
          for (const value of row.all) {
            const at = x(Math.max(bend(LOW), Math.min(bend(HIGH), bend(value))));
            layer.append(svgElement("circle", { cx: at.toFixed(1), cy: (top + 22 + 34 * next()).toFixed(1), r: 2, fill: value < 0 ? color("wrong") : row.paint(), "fill-opacity": 0.55 }));
          }
          const mid = x(Math.max(bend(LOW), Math.min(bend(HIGH), bend(row.mid))));
          layer.append(svgElement("line", { x1: mid, x2: mid, y1: top + 18, y2: top + 60, stroke: color("ink"), "stroke-width": 2.5 }));
        });
      },
    });

    // typical error against the angle
    const frame = (width, height) => ({ x: linearScale([0, 180], [56, width - 14]), y: logScale([0.003, 3e4], [height - 58, 24]) });
    const keep = (v) => Math.max(0.003, Math.min(3e4, v));

    stage.plot({
      height: 232,
      label: () => "Relative standard deviation by theory, against the angle between query and key, for positive features and for sine and cosine",
      draw(layer, width, height) {
        const state = now(), { x, y } = frame(width, height);
        layer.append(axis(y, { side: "left", at: 56, label: "standard deviation / true weight", ticks: [0.01, 0.1, 1, 10, 100, 1000, 10000], grid: width - 70 }));
        layer.append(svgElement("line", { x1: 56, x2: width - 14, y1: y(1), y2: y(1), stroke: color("muted"), "stroke-dasharray": "5 4" }));
        // two small arrows in place of a number of degrees
        for (const degrees of [0, 45, 90, 135, 180]) {
          const a = (degrees * Math.PI) / 180, px = Math.min(x(degrees), width - 22) - 4, py = height - 26;
          layer.append(svgElement("line", { x1: x(degrees), x2: x(degrees), y1: height - 58, y2: height - 53, stroke: color("line") }));
          for (const [turn, stroke] of [[0, "muted"], [a, "ink"]]) {
            layer.append(svgElement("line", { x1: px, y1: py, x2: px + 18 * Math.cos(turn), y2: py - 18 * Math.sin(turn), stroke: color(stroke), "stroke-width": 2.5, "stroke-linecap": "round" }));
          }
          layer.append(svgText(x(degrees), height - 8, `${degrees}°`, { anchor: degrees === 180 ? "end" : "middle", class: "muted" }));
        }
        const curve = (law) => Array.from({ length: 181 }, (_, d) => [x(d), y(keep(law(d, state.length, state.features)))]);
        layer.append(
          svgLine(curve(lawPositive), { stroke: ROWS[0].paint() }),
          svgLine(curve(lawWaves), { stroke: ROWS[2].paint() }),
          svgText(64, Math.max(34, y(keep(lawPositive(0, state.length, state.features))) + 16), "positive", { fill: ROWS[0].paint() }),
          svgText(width - 20, Math.max(34, y(keep(lawWaves(180, state.length, state.features))) + 16), "sine and cosine", { anchor: "end", fill: ROWS[2].paint() }),
          svgElement("line", { x1: x(state.angle), x2: x(state.angle), y1: 24, y2: height - 58, stroke: color("muted") }),
          svgElement("circle", { cx: x(state.angle), cy: y(keep(lawWaves(state.angle, state.length, state.features))), r: 5, fill: ROWS[2].paint() }),
        );
      },
      handles: [{
        label: "angle between query and key",
        at: (width) => { const { x, y } = frame(width, 232); return [x(stage.get("angle")), y(keep(lawPositive(stage.get("angle"), stage.get("length"), stage.get("features"))))]; },
        move: (px, _, width) => stage.set({ angle: Math.max(0, Math.min(180, Math.round(frame(width, 232).x.invert(px)))) }),
        nudge: (dx, dy) => stage.set({ angle: Math.max(0, Math.min(180, stage.get("angle") + 5 * (dx + dy))) }),
        text: () => `${stage.get("angle")} degrees`,
        fill: familyColor("feature map"),
      }],
    });

    stage.readout(() => {
      const { angle, length, features, truth, rows, draws } = now();
      const of = (row) => `${row.name}: the middle half lies between ${formatNumber(row.low, 2)} and ${formatNumber(row.high, 2)}` +
        (row.negative ? `, ${row.negative} are negative` : "") + `, the mean is ${formatNumber(row.mean, 2)}`;
      return `q and k of length ${length}, ${angle}° apart: the true weight is ${formatNumber(truth)}. ` +
        `Of ${draws} estimates with ${features.toLocaleString("en")} features, over that weight, by ${rows.map(of).join("; by ")}. ` +
        `By theory the standard deviation is ${formatNumber(lawPositive(angle, length, features), 2)} for positive features and ` +
        `${formatNumber(lawWaves(angle, length, features), 2)} for sine and cosine.`;
    });
    return stage.cleanup;
  },
};
