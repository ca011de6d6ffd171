// A real attention map goes through M rows: of the best map of that rank, of Linformer, or of Luna.

const T = 48, STARTS = 24, STEPS = 300;

function unpack({ size, bytes }, Kind, width) {
  const raw = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0)), numbers = new Kind(raw.buffer);
  return Array.from({ length: numbers.length / width }, (_, i) => Float64Array.from(numbers.subarray(i * width, (i + 1) * width), (x) => x * size));
}

// matrices are arrays of Float64Array rows
const filled = (rows, columns, value) => Array.from({ length: rows }, (_, i) => Float64Array.from({ length: columns }, (_, j) => value(i, j)));
const turned = (a) => filled(a[0].length, a.length, (i, j) => a[j][i]);
const each = (a, b, f) => filled(a.length, a[0].length, (i, j) => f(a[i][j], b[i][j]));

function product(a, b) {
  return a.map((row) => {
    const out = new Float64Array(b[0].length);
    row.forEach((x, k) => { const line = b[k]; for (let j = 0; j < out.length; j++) out[j] += x * line[j]; });
    return out;
  });
}

function softmax(x) {
  return x.map((row) => {
    const top = Math.max(...row), e = row.map((y) => Math.exp(y - top)), total = e.reduce((a, b) => a + b);
    return e.map((y) => y / total);
  });
}

// the gradient of a softmax along rows, given that of what it gives out
function behindSoftmax(S, dS) {
  return S.map((row, i) => {
    const mean = row.reduce((sum, s, j) => sum + s * dS[i][j], 0);
    return row.map((s, j) => s * (dS[i][j] - mean));
  });
}

function slopes(params, x, P, c) {
  const A = params.length === 2 ? null : softmax(product(params[0], turned(c)));
  const [E, F] = A ? [turned(A), turned(A)] : params;
  const S = softmax(product(x, E)), off = each(product(S, turned(F)), P, (a, b) => a - b);
  const dE = product(turned(x), behindSoftmax(S, product(off, F))), dF = product(turned(off), S);
  return A ? [product(behindSoftmax(A, turned(each(dE, dF, (a, b) => a + b))), c)] : [dE, dF];
}

// E and F, or the packing queries, after 300 steps of Adam on the squared error of one map
function train(x, c, M, how) {
  const P = softmax(x), slot = (j) => Math.floor((j * M) / T);
  const size = Array(M).fill(0);
  for (let j = 0; j < T; j++) size[slot(j)]++;
  const means = () => filled(T, M, (j, m) => (slot(j) === m ? 1 / size[m] : 0));
  const picked = () => filled(M, c[0].length, (m, n) => c[Math.floor((m * (T - 1)) / Math.max(1, M - 1))][n]);
  const params = how === "luna" ? [picked()] : [means(), means()], rate = how === "luna" ? 0.05 : 0.02;
  const zero = (a) => filled(a.length, a[0].length, () => 0), first = params.map(zero), second = params.map(zero);
  for (let step = 1; step <= STEPS; step++) {
    const a = 1 - 0.9 ** step, b = 1 - 0.999 ** step;
    slopes(params, x, P, c).forEach((slope, n) => slope.forEach((row, i) => row.forEach((g, j) => {
      const m = first[n][i], w = second[n][i];
      m[j] = 0.9 * m[j] + 0.1 * g;
      w[j] = 0.999 * w[j] + 0.001 * g * g;
      params[n][i][j] -= (rate * (m[j] / a)) / (Math.sqrt(w[j] / b) + 1e-8);
    })));
  }
  return params;
}

// singular values and left vectors of a map, by turning pairs of its rows until all are orthogonal (Jacobi)
function singular(P) {
  const rows = P.map((row) => Float64Array.from(row)), U = filled(T, T, (i, j) => (i === j ? 1 : 0));
  const turn = (a, b, cos, sin) => { for (let k = 0; k < a.length; k++) [a[k], b[k]] = [cos * a[k] - sin * b[k], sin * a[k] + cos * b[k]]; };
  for (let sweep = 0, left = 1; sweep < 30 && left; sweep++) {
    left = 0;
    for (let i = 0; i < T; i++) for (let j = i + 1; j < T; j++) {
      let aa = 0, bb = 0, ab = 0;
      for (let k = 0; k < T; k++) { aa += rows[i][k] ** 2; bb += rows[j][k] ** 2; ab += rows[i][k] * rows[j][k]; }
      if (Math.abs(ab) <= 1e-12 * Math.sqrt(aa * bb) || aa * bb < 1e-30) continue;
      const zeta = (bb - aa) / (2 * ab), t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta)), cos = 1 / Math.hypot(1, t);
      turn(rows[i], rows[j], cos, cos * t);
      turn(U[i], U[j], cos, cos * t);
      left++;
    }
  }
  const order = rows.map((row, i) => [Math.hypot(...row), i]).sort((a, b) => b[0] - a[0]);
  return { values: order.map(([s]) => s), left: order.map(([, i]) => U[i]), right: order.map(([, i]) => rows[i]) };
}

const norm = (a) => Math.sqrt(a.reduce((sum, row) => sum + row.reduce((s, x) => s + x * x, 0), 0));
const distance = (a, b) => norm(each(a, b, (x, y) => x - y)) / norm(b);

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), kept = new Map();
    const heads = stage.get("heads").map(({ scores, values, contents }) => ({
      scores: unpack(scores, Int16Array, T + STARTS), values: unpack(values, Int8Array, 64), contents: unpack(contents, Int8Array, 64),
    }));
    const once = (key, make) => { if (!kept.has(key)) kept.set(key, make()); return kept.get(key); };
    const keys = (head, start) => heads[head].scores.map((row) => row.subarray(start, start + T));
    const slots = (head, start, M, how, trained) => {
      const c = heads[head].contents, params = once(`${how} ${head} ${trained} ${M}`, () => train(keys(head, trained), c.slice(trained, trained + T), M, how));
      if (how === "linformer") return params;
      const A = turned(softmax(product(params[0], turned(c.slice(start, start + T)))));
      return [A, A];
    };
    let state = null;
    stage.draw(() => {
      const [head, start, M, how, trained] = ["head", "start", "rows", "how", "trained"].map(stage.get);
      const x = keys(head, start), P = once(`map ${head} ${start}`, () => softmax(x)), parts = once(`parts ${head} ${start}`, () => singular(P));
      const best = () => product(turned(parts.left.slice(0, M)), parts.right.slice(0, M));
      const pass = () => { const [E, F] = slots(head, start, M, how, trained); return product(softmax(product(x, E)), turned(F)); };
      const Q = how === "best" ? best() : pass(), V = heads[head].values.slice(start, start + T);
      const total = norm(P), rest = Math.sqrt(parts.values.slice(M).reduce((sum, s) => sum + s * s, 0)) / total;
      state = { P, Q, M, how, shares: parts.values.map((s) => (s / total) ** 2), rest, map: distance(Q, P), output: distance(product(Q, V), product(P, V)) };
    });

    const ways = { best: "the best rows for this very map", linformer: "E and F, by place (Linformer)", luna: "packing queries, by content (Luna)" };
    stage.select("head", { label: "head", options: stage.get("names").map((name, i) => [i, name]) });
    stage.select("how", { label: "squeeze by", options: Object.entries(ways) });
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    stage.slider("rows", { label: "rows M", min: 1, max: 16, step: 1 });
    stage.slider("start", { label: "the text begins at token", min: 0, max: STARTS, step: 1 });
    const here = () => stage.get("how") === "best" || stage.get("trained") === stage.get("start");
    stage.button({ label: "Train on this text", disabled: here, press: () => stage.set({ trained: stage.get("start") }) });

    const head = 22, bars = 92;
    const side = (width) => Math.floor((width - 16) / 2);
    stage.plot({
      height: (width) => head + side(width) + bars + 62,
      label: () => "The map of the head, the map that is left of it, and the shares of its singular values; the read-out below has the numbers",
      draw(layer, width) {
        const size = side(width), small = width < 520 ? "font-size:11px" : "", top = Math.max(...state.P.map((row) => Math.max(...row)));
        const at = [0, size + 16], words = ["the head's map", `through ${state.M} row${state.M > 1 ? "s" : ""}`];
        [state.P, state.Q].forEach((map, n) => layer.append(
          svgText(at[n], 14, words[n], { "font-weight": 600, style: small }),
          heatmap(map.map((row) => [...row].map((w) => (Math.abs(w) < 0.02 * top ? 0 : w))), { x: at[n], y: head, width: size, top, mark: (i, j, w) => (w < 0 ? color("wrong") : null) }),
        ));
        const floor = head + size + 26 + bars, step = Math.min(20, width / 25), line = linearScale([0, 1], [floor, floor - bars + 8]);
        layer.append(svgText(0, head + size + 20, "share of the squared weights in each singular direction", { class: "muted", style: small }));
        state.shares.slice(0, 24).forEach((share, i) => layer.append(svgElement("rect", {
          x: i * step, width: step - 2, y: line(share), height: Math.max(0.5, floor - line(share)), fill: i < state.M ? color("accent") : color("line"),
        })));
        layer.append(
          svgElement("line", { x1: 0, x2: 24 * step, y1: floor, y2: floor, stroke: color("line") }),
          svgElement("line", { x1: state.M * step - 1, x2: state.M * step - 1, y1: floor + 6, y2: floor - bars + 8, stroke: color("second"), "stroke-width": 2 }),
          svgText(state.M * step - 1, floor + 22, `M = ${state.M}`, { anchor: state.M < 3 ? "start" : "middle", style: small }),
        );
      },
    });
    stage.append(htmlElement("p", { class: "explorable-alt" },
      "Queries go down, keys to the right; the stronger the colour, the larger the weight. ", htmlElement("span", { style: `color:${color("wrong")};font-weight:600` }, "Negative weights"), " look like this."));

    stage.readout(() => {
      const [start, trained, words] = ["start", "trained", "words"].map(stage.get), percent = (x) => `${formatNumber(100 * x, x < 0.1 ? 1 : 2)} %`;
      const mass = Array.from({ length: T }, (_, j) => state.P.reduce((sum, row) => sum + row[j], 0) / T), most = mass.indexOf(Math.max(...mass));
      const who = { best: state.M === 1 ? "The best row" : `The best ${state.M} rows`, linformer: `E and F, trained on the text from token ${trained} on,`, luna: `Packing queries, trained on the text from token ${trained} on,` }[state.how];
      return `Tokens ${start} to ${start + T - 1}; ${percent(mass[most])} of all weight is on token ${start + most}, “${words[start + most]}”. `
        + `${who} ${state.how === "best" && state.M === 1 ? "misses" : "miss"} ${percent(state.map)} of the map and ${percent(state.output)} of the outputs`
        + (state.how === "best" ? "; nothing of that rank misses less of the map." : `; the best ${state.M === 1 ? "row misses" : `${state.M} rows miss`} ${percent(state.rest)} of the map.`);
    });
    return stage.cleanup;
  },
};
