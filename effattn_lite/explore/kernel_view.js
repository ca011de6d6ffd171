// One query and eight keys in the plane; softmax weights beside those of a finite feature map.

const FEATURES = { elu1: 2, relu: 2, taylor1: 3, taylor2: 6, taylor4: 15 }, REACH = 4.5;

const elu1 = (x) => (x > 0 ? x + 1 : Math.exp(x)), relu = (x) => Math.max(x, 0);

// weight of a key before it is divided by the sum of all
function kernelOf(name) {
  const score = ([a, b], [c, d]) => (a * c + b * d) / Math.SQRT2;
  if (name === "softmax") return (q, k) => Math.exp(score(q, k));
  if (name === "elu1" || name === "relu") {
    const phi = name === "elu1" ? elu1 : relu;
    return ([a, b], [c, d]) => phi(a) * phi(c) + phi(b) * phi(d);
  }
  const order = Number(name.slice(6));
  return (q, k) => {
    const x = score(q, k);
    let term = 1, sum = 1;
    for (let n = 1; n <= order; n++) { term *= x / n; sum += term; }
    return sum;
  };
}

const firstOf = (row) => row.reduce((best, w, i) => (w > row[best] + 1e-12 ? i : best), 0);

// which keys are first for some query: directions all around, short and long
function winners(kernel, keys) {
  const seen = new Set();
  for (let i = 0; i < 720; i++) {
    for (const r of [0.2, 1, 3, 6]) {
      const a = ((i + 0.5) * Math.PI) / 360, row = keys.map((k) => kernel([r * Math.cos(a), r * Math.sin(a)], k));
      if (Math.max(...row) > 1e-12) seen.add(firstOf(row));
    }
  }
  return seen;
}

// words for a share: "12 %"
const share = (w) => (w > 0.9995 && w < 1 ? "> 99.9 %" : `${formatNumber(100 * w, Math.abs(w) < 0.0995 ? 2 : 3)} %`);

export default {
  render({ model, el }) {
    const stage = makeStage(model, el);
    const paints = { softmax: familyColor("softmax attention"), map: familyColor("feature map") };
    let cache = { id: null };

    const now = () => {
      const length = stage.get("length"), name = stage.get("kernel"), q = [stage.get("x"), stage.get("y")];
      const keys = stage.get("circle").map(([a, b]) => [a * length, b * length]);
      if (cache.id !== `${name} ${length}`) {
        const both = { softmax: kernelOf("softmax"), map: kernelOf(name) };
        cache = { id: `${name} ${length}`, both, can: { softmax: winners(both.softmax, keys), map: winners(both.map, keys) } };
      }
      const view = (side) => {
        const raw = keys.map((k) => cache.both[side](q, k)), sum = raw.reduce((a, b) => a + b, 0);
        const nothing = Math.abs(sum) < 1e-9, w = raw.map((x) => (nothing ? 0 : x / sum)), first = firstOf(raw);
        const negative = w.some((x) => x < -1e-12);
        const spread = nothing || negative ? null : Math.exp(-w.reduce((h, x) => h + (x > 0 ? x * Math.log(x) : 0), 0));
        return { w, first, nothing, negative, spread, can: cache.can[side], kernel: cache.both[side] };
      };
      const asked = keys.findIndex(([a, b]) => Math.hypot(a - q[0], b - q[1]) < 0.02);
      return { q, keys, length, asked, words: dict(stage.get("kernels"))[name], features: FEATURES[name], softmax: view("softmax"), map: view("map") };
    };
    const dict = (pairs) => Object.fromEntries(pairs);

    stage.select("kernel", { label: "beside the softmax", options: stage.get("kernels") });
    stage.slider("length", { label: "length of the keys", values: stage.get("lengths"), format: (x) => String(x) });
    stage.button({
      label: "Ask with the next key itself",
      press: () => {
        const { keys, asked } = now(), next = keys[(asked + 1) % keys.length];
        stage.set({ x: next[0], y: next[1] });
      },
    });
    stage.button({ label: "Double the query", press: () => {
      const grow = Math.min(2, 4 / Math.max(1e-9, Math.abs(stage.get("x")), Math.abs(stage.get("y"))));
      stage.set({ x: grow * stage.get("x"), y: grow * stage.get("y") });
    } });

    const clamp = (x) => Math.max(-4, Math.min(4, x));
    const panel = (width) => Math.min(300, (width - 16) / 2);
    const frame = (width, side) => {
      const size = panel(width), left = side === "softmax" ? width / 2 - 8 - size : width / 2 + 8;
      return { size, left, x: linearScale([-REACH, REACH], [left, left + size]), y: linearScale([-REACH, REACH], [26 + size, 26]) };
    };

    // rows of cells that the present winner would win, as one rectangle each
    const territory = (layer, view, f, keys, paint) => {
      const n = 48, cell = f.size / n, tint = svgElement("g", { opacity: 0.16 });
      layer.append(tint);
      for (let i = 0; i < n; i++) {
        let from = null;
        for (let j = 0; j <= n; j++) {
          const at = [-REACH + ((j + 0.5) * 2 * REACH) / n, REACH - ((i + 0.5) * 2 * REACH) / n];
          const row = j < n ? keys.map((k) => view.kernel(at, k)) : null;
          const mine = row && Math.max(...row) > 1e-12 && firstOf(row) === view.first;
          if (mine && from === null) from = j;
          if (!mine && from !== null) {
            tint.append(svgElement("rect", { x: f.left + from * cell, y: 26 + i * cell, width: (j - from) * cell, height: cell + 0.3, fill: paint }));
            from = null;
          }
        }
      }
    };

    const drawPlane = (layer, width, side) => {
      const state = now(), view = state[side], f = frame(width, side), paint = paints[side], big = Math.min(18, f.size / 13);
      layer.append(
        svgText(f.left + f.size / 2, 16, side === "softmax" ? "softmax" : state.words, { anchor: "middle", "font-weight": 600 }),
        svgElement("rect", { x: f.left, y: 26, width: f.size, height: f.size, fill: color("panel") }),
      );
      if (!view.nothing) territory(layer, view, f, state.keys, paint);
      layer.append(
        svgElement("line", { x1: f.left, x2: f.left + f.size, y1: f.y(0), y2: f.y(0), stroke: color("line") }),
        svgElement("line", { x1: f.x(0), x2: f.x(0), y1: 26, y2: 26 + f.size, stroke: color("line") }),
      );
      state.keys.forEach((k, i) => {
        const w = view.w[i], x = f.x(k[0]), y = f.y(k[1]), out = stage.get("circle")[i];
        layer.append(
          svgElement("circle", { cx: x, cy: y, r: big, fill: "none", stroke: color("muted"), "stroke-dasharray": view.can.has(i) ? null : "2 3" }),
          svgElement("circle", { cx: x, cy: y, r: Math.max(1.5, big * Math.sqrt(Math.min(1, Math.abs(w)))), fill: w < 0 ? color("wrong") : paint }),
          svgText(x + out[0] * (big + 8), y - out[1] * (big + 8) + 4, i + 1, { anchor: "middle", "font-weight": i === view.first && !view.nothing ? 700 : 400 }),
        );
      });
      layer.append(svgElement("line", { x1: f.x(0), y1: f.y(0), x2: f.x(state.q[0]), y2: f.y(state.q[1]), stroke: color("accent"), "stroke-width": 2 }));
    };

    const knob = (side) => ({
      label: side === "softmax" ? "query, in the plane of the softmax" : "query, in the plane of the feature map",
      at: (width) => { const f = frame(width, side); return [f.x(stage.get("x")), f.y(stage.get("y"))]; },
      move: (px, py, width) => {
        const f = frame(width, side);
        stage.set({ x: clamp(Number(f.x.invert(px).toFixed(2))), y: clamp(Number(f.y.invert(py).toFixed(2))) });
      },
      nudge: (dx, dy) => stage.set({ x: clamp(Number((stage.get("x") + 0.2 * dx).toFixed(2))), y: clamp(Number((stage.get("y") + 0.2 * dy).toFixed(2))) }),
      radius: 7,
      text: () => `x ${formatNumber(stage.get("x"), 2)}, y ${formatNumber(stage.get("y"), 2)}`,
    });

    stage.plot({
      height: (width) => panel(width) + 30,
      label: () => "Two planes with the query and eight keys; the area of a disc is the weight, the tint is where the same key would win",
      draw(layer, width) { drawPlane(layer, width, "softmax"); drawPlane(layer, width, "map"); },
      handles: [knob("softmax"), knob("map")],
    });

    stage.plot({
      height: 176,
      label: () => "Weight of each key: softmax at the left of a pair, the feature map at the right",
      draw(layer, width, height) {
        const state = now(), bottom = height - 40, negative = state.map.negative;
        const y = linearScale([negative ? -0.5 : 0, 1], [bottom, 28]), slot = (width - 52) / state.keys.length;
        layer.append(axis(y, { side: "left", at: 40, label: "weight", ticks: negative ? [-0.5, 0, 0.5, 1] : [0, 0.5, 1], grid: width - 52 }));
        state.keys.forEach((_, i) => {
          ["softmax", "map"].forEach((side, s) => {
            const w = Math.max(negative ? -0.5 : 0, Math.min(1, state[side].w[i])), wide = Math.min(26, slot * 0.36);
            const x = 44 + (i + 0.5) * slot + (s ? 1 : -wide - 1);
            layer.append(svgElement("rect", { x, y: Math.min(y(0), y(w)), width: wide, height: Math.max(1, Math.abs(y(w) - y(0))), fill: w < 0 ? color("wrong") : paints[side] }));
          });
          layer.append(svgText(44 + (i + 0.5) * slot, bottom + 18, i + 1, { anchor: "middle" }));
        });
        layer.append(svgText(44 + (width - 52) / 2, bottom + 36, "key", { anchor: "middle", class: "muted" }));
      },
    });

    stage.readout(() => {
      const state = now(), { softmax, map, words, features, asked, keys } = state;
      const of = (view, name) => {
        if (view.nothing) return `${name} gives no key any weight: the denominator is 0, and there is no answer`;
        const top = `${name} puts ${share(view.w[view.first])} on key ${view.first + 1}`;
        if (view.negative) return `${top} and ${share(Math.min(...view.w))} on another: this is no average`;
        return `${top} and spreads over ${formatNumber(view.spread, 2)} keys`;
      };
      const who = asked >= 0 ? `Asked with key ${asked + 1} itself` : `Asked with (${formatNumber(state.q[0], 2)}, ${formatNumber(state.q[1], 2)})`;
      return `${who}: ${of(softmax, "softmax")}; ${of(map, `${words} (${features} features)`)}. ` +
        `Of ${keys.length} keys, ${softmax.can.size} can come first under softmax, ${map.can.size} under ${words}.`;
    });
    return stage.cleanup;
  },
};
