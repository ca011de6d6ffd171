// Twelve input gates to drag, a memory of any float format, with and without its running maximum.

const LOW = -30, HIGH = 110;

function halfEven(x) {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
}

// x >= 0 with that many significant bits, the exponent at least `least`, infinity above `most`
function rounded(x, bits, least, most) {
  if (x === 0 || !Number.isFinite(x)) return x;
  const step = 2 ** (Math.max(Math.floor(Math.log2(x)), least) - bits + 1), y = halfEven(x / step) * step;
  return y > most ? Infinity : y;
}

const FORMATS = {
  float16: { round: (x) => rounded(x, 11, -14, 65504), most: 65504 },
  bfloat16: { round: (x) => rounded(x, 8, -126, 3.3895e38), most: 3.3895e38 },
  float32: { round: (x) => rounded(x, 24, -126, 3.4028235e38), most: 3.4028235e38 },
};

const minus = (x, digits = 3) => formatNumber(x, digits).replace("-", "−");
const percent = (x) => (Number.isNaN(x) ? "NaN" : x > 0.9995 && x < 1 ? "> 99.9 %" : `${formatNumber(100 * x, 2)} %`);

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), T = stage.get("gates").length;
    const green = familyColor("gated decay"), loud = color("second");
    const tokens = Array.from({ length: T }, (_, t) => t);

    const now = () => {
      const gates = stage.get("gates"), logf = Math.log(stage.get("keep")), on = stage.get("stabilised");
      const { round, most } = FORMATS[stage.get("format")];
      let m = -Infinity, n = 0, cells = tokens.map(() => 0);
      const trail = [], edge = [];
      gates.forEach((gate, t) => {
        const faded = m + logf;
        m = Math.max(faded, gate);
        const past = round(Math.exp(on ? faded - m : logf)), own = round(Math.exp(on ? gate - m : gate));
        cells = cells.map((c, j) => round(round(past * c) + (j === t ? own : 0)));
        n = round(round(past * n) + own);
        trail.push(m);
        edge.push(n);
      });
      const logs = gates.map((gate, t) => gate + (T - 1 - t) * logf), top = Math.max(...logs);
      const total = logs.reduce((sum, x) => sum + Math.exp(x - top), 0);
      return { gates, trail, edge, n, m, on, most, stored: cells.map((c) => c / n), exact: logs.map((x) => Math.exp(x - top) / total) };
    };

    const shapes = stage.get("shapes");
    stage.select("shape", { label: "gates", options: [...shapes.map(([key, words]) => [key, words]), ["own", "your own"]] });
    const apply = () => {
      const found = shapes.find(([key]) => key === stage.get("shape"));
      if (found) stage.set({ gates: found[2] });
    };
    model.on("change:shape", apply);
    stage.undo.push(() => model.off("change:shape", apply));
    stage.select("format", { label: "memory in", options: Object.keys(FORMATS) });
    stage.toggle("stabilised", { label: "keep everything times e^−m" });
    stage.slider("keep", { label: "forget gate: share kept a token", values: [0.5, 0.8, 0.9, 0.99, 1], format: (x) => String(x) });

    const set = (t, value) => {
      const gates = [...stage.get("gates")];
      gates[t] = Math.max(-20, Math.min(100, Math.round(value)));
      if (gates[t] !== stage.get("gates")[t]) stage.set({ shape: "own", gates });
    };
    const place = (width) => linearScale([0.4, T + 0.6], [40, width - 8]);
    const level = linearScale([LOW, HIGH], [214, 30]);
    stage.plot({
      height: 262,
      label: () => "The input gate of every token and the stabiliser m, which follows the largest; the limits of the number format",
      draw(layer, width) {
        const { gates, trail, most } = now(), x = place(width);
        layer.append(
          axis(x, { at: 214, label: "token", ticks: tokens.map((t) => t + 1) }),
          axis(level, { side: "left", at: 40, label: "input gate i: a token is written with weight e^i", ticks: [-20, 0, 20, 40, 60, 80, 100], format: (v) => minus(v), grid: width - 48 }),
        );
        const end = Math.log(most);
        layer.append(
          svgElement("rect", { x: 40, y: level(HIGH), width: width - 48, height: level(end) - level(HIGH), fill: color("wrong"), "fill-opacity": 0.1 }),
          svgElement("line", { x1: 40, x2: width - 8, y1: level(end), y2: level(end), stroke: color("wrong"), "stroke-width": 1.5, "stroke-dasharray": "6 4" }),
          svgText(46, level(HIGH) + 15, `${stage.get("format")} is infinite above e^${end.toFixed(1)}`),
        );
        const steps = trail.flatMap((m, t) => [[x(t + 0.6), level(m)], [x(t + 1.4), level(m)]]);
        layer.append(svgLine(steps, { stroke: loud, "stroke-width": 3 }));
        layer.append(svgText(x(T + 0.4), level(trail[T - 1]) - 10, `m = ${minus(trail[T - 1])}`, { anchor: "end", "font-weight": 600, fill: loud }));
        gates.forEach((gate, t) => layer.append(svgElement("line", { x1: x(t + 1), x2: x(t + 1), y1: 214, y2: level(gate), stroke: green, "stroke-width": 2 })));
      },
      handles: tokens.map((t) => ({
        label: `input gate of token ${t + 1}`,
        at: (width) => [place(width)(t + 1), level(stage.get("gates")[t])],
        move: (px, py) => set(t, level.invert(py)),
        nudge: (dx, dy) => set(t, stage.get("gates")[t] + (dx || dy)),
        text: () => `i = ${minus(stage.get("gates")[t])}`,
        fill: green,
        radius: 8,
      })),
    });

    const height = linearScale([0, 1], [136, 30]);
    stage.plot({
      height: 180,
      label: () => "Share of every token in the average that is read after the last one: outlined what is true, filled what the memory answers",
      draw(layer, width) {
        const { stored, exact } = now(), x = place(width), w = x(1.36) - x(0.64);
        layer.append(
          axis(x, { at: 136, label: "token", ticks: tokens.map((t) => t + 1) }),
          axis(height, { side: "left", at: 40, label: "share in what is read: outline true, filled as stored", ticks: [0, 0.5, 1], grid: width - 48 }),
        );
        const lost = stored.some(Number.isNaN);
        tokens.forEach((t) => {
          const left = x(t + 0.64), bar = (share) => ({ x: left, y: height(share), width: w, height: Math.max(136 - height(share), 0.01) });
          if (!lost) layer.append(svgElement("rect", { ...bar(stored[t]), fill: green, "fill-opacity": 0.75 }));
          layer.append(svgElement("rect", { ...bar(exact[t]), fill: "none", stroke: color("ink"), "stroke-width": 1.5 }));
        });
        if (lost) layer.append(svgText((40 + width - 8) / 2, 92, "the memory answers: not a number", {
          anchor: "middle", "font-weight": 700, "paint-order": "stroke", stroke: color("paper"), "stroke-width": 6, "stroke-linejoin": "round",
        }));
      },
    });

    stage.readout(() => {
      const { gates, n, m, on, edge, stored, exact } = now();
      const best = exact.indexOf(Math.max(...exact)), broken = edge.findIndex((x) => !Number.isFinite(x) || x === 0);
      const format = stage.get("format"), kept = on ? `as n = ${formatNumber(n)} times e^${minus(m)}` : `as n = ${formatNumber(n)}`;
      const lost = tokens.filter((t) => stored[t] === 0 && exact[t] > 0).length;
      const worst = Math.max(...tokens.map((t) => Math.abs(stored[t] - exact[t])));
      const answer = Number.isNaN(stored[best])
        ? `The answer is not a number${broken >= 0 ? `: from token ${broken + 1} on n was ${formatNumber(edge[broken])}` : ""}.`
        : `Stored, it has ${percent(stored[best])}; ${lost ? `${lost} of ${T} tokens have left no trace, ` : ""}${worst < 5e-6 ? "every share is right to five digits" : `no share is off by more than ${percent(worst)}`}.`;
      return `Loudest at the end is token ${best + 1} (i = ${minus(gates[best])}), with ${percent(exact[best])} of the average. ` +
        `The total weight stands in ${format} ${kept}. ${answer}`;
    });
    return stage.cleanup;
  },
};
