// A bias for every lag: which of them can two running sums carry from one reader to the next?

const LOW = -8, HIGH = 5;

const minus = (x, digits = 2) => (Math.abs(x) < 5e-3 ? "0" : formatNumber(x, digits)).replace("-", "−");

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), T = stage.get("bias").length;
    const own = color("accent"), carried = familyColor("element-wise"), loud = color("second");
    const lags = Array.from({ length: T }, (_, d) => d);

    // shares of tokens 1..t under a bias for each lag
    const shares = (keys, bias, t) => {
      const logs = keys.slice(0, t).map((k, j) => k + bias[t - 1 - j]), top = Math.max(...logs);
      const total = logs.reduce((sum, x) => sum + Math.exp(x - top), 0);
      return { logs, top, share: logs.map((x) => Math.exp(x - top) / total) };
    };
    const now = () => {
      const bias = stage.get("bias"), t = stage.get("reader"), keys = stage.get("texts").find(([key]) => key === stage.get("text"))[2];
      const g = bias[2] - bias[1], line = lags.map((d) => (d === 0 ? bias[0] : bias[1] + g * (d - 1)));
      const moves = lags.slice(1, t - 1).map((d) => bias[d + 1] - bias[d]);
      return { bias, t, keys, g, line, moves, asked: shares(keys, bias, t), kept: shares(keys, line, t), before: shares(keys, bias, t - 1) };
    };
    let state = null;
    stage.draw(() => { state = now(); });

    const shapes = stage.get("shapes");
    stage.select("shape", { label: "biases:", options: [...shapes.map(([key, words]) => [key, words]), ["own", "your own"]] });
    const apply = () => {
      const found = shapes.find(([key]) => key === stage.get("shape"));
      if (found) stage.set({ bias: found[2] });
    };
    model.on("change:shape", apply);
    stage.undo.push(() => model.off("change:shape", apply));
    stage.select("text", { label: "keys:", options: stage.get("texts").map(([key, words]) => [key, words]) });
    stage.slider("reader", { label: "the token that reads", min: 2, max: T, step: 1 });
    stage.button({
      label: "Put lags 3 and more on the line",
      press: () => stage.set({ shape: "own", bias: state.line.map((b) => Math.max(LOW, Math.min(HIGH - 1, b))) }),
      disabled: () => state.line.every((b, d) => Math.abs(Math.max(LOW, Math.min(HIGH - 1, b)) - state.bias[d]) < 1e-9),
    });

    const set = (d, value) => {
      const bias = [...stage.get("bias")];
      bias[d] = Math.max(LOW, Math.min(HIGH - 1, Math.round(value * 10) / 10));
      if (bias[d] !== stage.get("bias")[d]) stage.set({ shape: "own", bias });
    };
    const column = (width) => linearScale([-0.6, T - 0.4], [36, width - 8]);
    const level = linearScale([LOW, HIGH], [176, 28]);
    stage.plot({
      height: 222,
      label: () => "The bias of every lag, and the line through lags 1 and 2 that two running sums follow",
      draw(layer, width) {
        const x = column(width), { line } = state;
        layer.append(
          axis(x, { at: 176, label: "lag: how many tokens ago", ticks: lags }),
          axis(level, { side: "left", at: 36, label: "position bias b, in nats; dashed: what two sums can follow", ticks: [-8, -4, 0, 4], format: (v) => minus(v), grid: width - 44 }),
          svgLine(line.slice(1).map((b, d) => [x(d + 1), b < LOW - 1 ? NaN : level(b)]), { stroke: carried, "stroke-width": 2.5, "stroke-dasharray": "7 5" }),
          svgText(x(0), level(state.bias[0]) + (state.bias[0] > 2.5 ? 24 : -14), "itself", { anchor: "middle", class: "muted" }),
        );
      },
      handles: lags.map((d) => ({
        label: `bias at lag ${d}`,
        at: (width) => [column(width)(d), level(stage.get("bias")[d])],
        move: (px, py) => set(d, level.invert(py)),
        nudge: (dx, dy) => set(d, stage.get("bias")[d] + 0.2 * (dx || dy)),
        text: () => `b = ${minus(stage.get("bias")[d])}`,
        fill: d === 0 ? loud : own,
        radius: 8,
      })),
    });

    const place = (width) => linearScale([0.4, T + 0.6], [36, width - 8]);
    const height = linearScale([-11, 8], [176, 28]);
    stage.plot({
      height: 222,
      label: () => `Exponents of the tokens up to token ${state.t}: filled what it sees, rings what token ${state.t - 1} saw, and the largest, m`,
      draw(layer, width) {
        const x = place(width), { asked, before, t } = state, at = (v) => height(Math.max(-11, v));
        layer.append(
          axis(x, { at: 176, label: "token", ticks: lags.map((d) => d + 1) }),
          axis(height, { side: "left", at: 36, label: `key + bias: dots for reader ${t}, rings for reader ${t - 1}`, ticks: [-10, -5, 0, 5], format: (v) => minus(v), grid: width - 44 }),
          svgLine([[x(0.5), height(asked.top)], [x(t + 0.5), height(asked.top)]], { stroke: loud, "stroke-width": 2 }),
          svgText(x(t + 0.5) + 4 > width - 70 ? x(t - 1) : x(t + 0.5) + 4, height(asked.top) - 6, `m = ${minus(asked.top)}`, { "font-weight": 600 }),
        );
        asked.logs.forEach((v, j) => {
          const cx = x(j + 1);
          if (j < t - 2) layer.append(svgLine([[cx, at(before.logs[j])], [cx, at(v)]], { stroke: color("muted"), "stroke-width": 1.5 }));
          if (j < t - 1) layer.append(svgElement("circle", { cx, cy: at(before.logs[j]), r: 5, fill: color("paper"), stroke: j === t - 2 ? color("line") : color("muted"), "stroke-width": 1.5 }));
          layer.append(svgElement("circle", { cx, cy: at(v), r: 5, fill: j === t - 1 ? loud : own }));
        });
      },
    });

    const tall = linearScale([0, 1], [136, 28]);
    stage.plot({
      height: 180,
      label: () => "Share of every token in the average: outlined what the biases ask for, filled what two running sums carry",
      draw(layer, width) {
        const x = place(width), { asked, kept } = state, w = x(1.36) - x(0.64);
        layer.append(
          axis(x, { at: 136, label: "token", ticks: lags.map((d) => d + 1) }),
          axis(tall, { side: "left", at: 36, label: "share: outlined as asked for, filled as two sums carry it", ticks: [0, 0.5, 1], grid: width - 44 }),
        );
        asked.share.forEach((p, j) => {
          const bar = (s) => ({ x: x(j + 0.64), y: tall(s), width: w, height: Math.max(136 - tall(s), 0.01) });
          layer.append(
            svgElement("rect", { ...bar(kept.share[j]), fill: carried, "fill-opacity": 0.75 }),
            svgElement("rect", { ...bar(p), fill: "none", stroke: color("ink"), "stroke-width": 1.5 }),
          );
        });
      },
    });

    stage.readout(() => {
      const { t, moves, asked, kept, g, bias } = state, low = Math.min(...moves), high = Math.max(...moves);
      const worst = Math.max(...asked.share.map((p, j) => Math.abs(p - kept.share[j])));
      const moved = t < 3
        ? "Only one earlier token: nothing has had to move together yet."
        : high - low < 1e-6
          ? `From reader ${t - 1} to reader ${t} all tokens before them moved by ${minus(low)}: one factor e^${minus(low)} for both sums, and every proportion stays.`
          : `From reader ${t - 1} to reader ${t} the tokens before them moved by between ${minus(low)} and ${minus(high)}: no single factor does that.`;
      const verdict = worst < 1e-9 ? "Two sums carry this average exactly." : `Two sums, fading by e^${minus(g)} a token, are off by up to ${formatNumber(100 * worst, 2)} % of the average.`;
      return `${moved} ${verdict} The token itself enters with its own bias, ${minus(bias[0])}: it is added when the average is read, and never carried. Largest exponent: m = ${minus(asked.top)}.`;
    });
    return stage.cleanup;
  },
};
